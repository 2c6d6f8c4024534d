"""What a class takes when it is built, also through a `**options` that it hands to its bases. Standard library only."""

import inspect
import typing
from typing import Any

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Constructor:
    """The named parameters of a class's `__init__`, and of its bases' as far as each takes any name and hands it on."""

    def __init__(self, of: type) -> None:
        self.parameters: dict[str, inspect.Parameter] = {}
        self.hints: dict[str, Any] = {}
        self.required: list[str] = []
        """Those of the class itself: what a base requires, the class may give it."""
        self.takes_any = False
        """Whether a name beyond `parameters` is taken too."""
        self._is_first = True
        for base in of.__mro__:
            if base.__module__.partition(".")[0] in ("builtins", "torch"):
                return
            if "__init__" in vars(base):
                self._add(base.__init__)
                if not self.takes_any:
                    return

    def _add(self, function: Any) -> None:
        signature = list(inspect.signature(function).parameters.items())[1:]  # without self
        if self._is_first:
            self._is_first = False
            self.required = [
                name for name, p in signature if p.kind in _NAMED and p.default is p.empty
            ]
        for name, parameter in signature:
            if parameter.kind in _NAMED:
                self.parameters.setdefault(name, parameter)
        for name, hint in _hints(function).items():
            self.hints.setdefault(name, hint)
        self.takes_any = any(p.kind is p.VAR_KEYWORD for _, p in signature)


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a forward reference of the user's: its options go unchecked
        return {}
