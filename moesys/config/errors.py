"""What is wrong with a configuration: one line per problem, each with its key, rule, value and fix."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_NOT_GIVEN = object()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One violated rule. Reads as a sentence: `key=given rule: fix`."""

    key: str
    """Dotted path, e.g. model.moe.num_experts."""
    rule: str
    """What must hold, with the other value: "must be a multiple of parallel.ep=4"."""
    fix: str
    """What to do: "use 4 or 8"."""
    given: Any = _NOT_GIVEN

    def __str__(self) -> str:
        return f"{self.key}{self._value()} {self.rule}: {self.fix}"

    def _value(self) -> str:
        if self.given is _NOT_GIVEN:
            return ""
        if self.given is None or isinstance(self.given, bool):
            return f"={ {None: 'null', True: 'true', False: 'false'}[self.given] }"
        text = repr(self.given) if isinstance(self.given, str) else str(self.given)
        return f"={text if len(text) <= 120 else text[:117] + '...'}"


class ConfigError(ValueError):
    """A configuration that cannot run, with every problem that was found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems
        super().__init__(tuple(problems))

    @property
    def problems(self) -> tuple[Problem, ...]:
        return self.args[0]

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"configuration: {self.problems[0]}"
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        return f"configuration: {len(self.problems)} problems{lines}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The fix for a misspelt word: the one that differs by case alone, the closest known words, else all of them."""
    names = sorted(set(known))
    alike = [name for name in names if name.lower() == word.lower()]
    close = alike or difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"choose from {', '.join(names)}" if names else "there is nothing to choose from"
