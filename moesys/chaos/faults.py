"""Faults as text and as numbers: `kill rank=1 step=40 phase=exchange`. Pure.

A fault happens once, on one rank, when that rank enters the phase of the step. Several are separated by `;`
or lines; `#` begins a comment.
"""

import difflib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from moesys.config.schema import RunConfig

PHASES = ("data", "forward", "exchange", "backward", "optimizer", "save")
"""Of a step. Forward and exchange mean the step's first; save means the first save at or after the step."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a kind of fault may be given."""

    does: str
    phases: tuple[str, ...] = PHASES
    """The first is the default."""
    seconds: float | None = None
    """The default duration; None: the kind has none."""
    ends_rank: bool = False
    """The rank ends by the fault itself, at once."""
    ends_job: bool = False
    """All ranks end because of it, and train on until they see it."""


KINDS: Mapping[str, Rules] = {
    "kill": Rules(does="SIGKILL to the rank", ends_rank=True),
    "stop": Rules(does="SIGSTOP to the rank, SIGCONT after `seconds` (0 = never)", seconds=0.0),
    "exception": Rules(does="an error in the rank's main thread, or in the thread that saves"),
    "slow": Rules(does="the rank sleeps for `seconds`", seconds=1.0),
    "partition": Rules(does="the rank hears nothing from anyone for `seconds`", seconds=5.0),
    "disk_full": Rules(
        does="no room for checkpoints for `seconds`", phases=("save", *PHASES[:-1]), seconds=2.0
    ),
    "read_only": Rules(
        does="checkpoints cannot be written for `seconds`",
        phases=("save", *PHASES[:-1]),
        seconds=2.0,
    ),
    "corrupt_checkpoint": Rules(
        does="one bit of the newest checkpoint flips, then SIGKILL to the rank", ends_rank=True
    ),
    "agent": Rules(does="SIGKILL to torchrun's agent, the parent of the rank", ends_job=True),
    "nan": Rules(does="one element of one gradient becomes NaN", phases=("optimizer",)),
    "bit_flip": Rules(does="one bit of one parameter flips", phases=PHASES[:-1]),
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    kind: str
    rank: int
    step: int
    """From 1, as in metrics.jsonl."""
    phase: str
    seconds: float | None = None
    """How long it lasts; None for kinds that have no duration."""

    def __str__(self) -> str:
        """The text that `parse_faults` reads."""
        text = f"{self.kind} rank={self.rank} step={self.step} phase={self.phase}"
        return text if self.seconds is None else f"{text} seconds={self.seconds!r}"


_KEYS = tuple(field.name for field in fields(Fault) if field.name != "kind")


def format_faults(faults: Sequence[Fault]) -> str:
    """One line; `parse_faults` gives them back."""
    return "; ".join(map(str, faults))


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults that `text` lists, in its order.

    Raises:
        ValueError: naming everything that is wrong, with the fault it stands in.
    """
    faults: list[Fault] = []
    problems: list[str] = []
    for line in text.splitlines():
        for part in line.partition("#")[0].split(";"):
            if not part.strip():
                continue
            fault, wrong = _parse_one(part.split())
            problems += [f"{part.strip()!r}: {problem}" for problem in wrong]
            if fault is not None:
                faults.append(fault)
    if not faults and not problems:
        problems.append("no fault is named: write for example 'kill rank=1 step=40 phase=exchange'")
    if problems:
        raise ValueError(_listed(problems))
    return tuple(faults)


def _parse_one(words: Sequence[str]) -> tuple[Fault | None, list[str]]:
    kind, *rest = words
    rules = KINDS.get(kind)
    if rules is None:
        return None, [f"{kind!r} is no kind of fault: {_choose(kind, tuple(KINDS))}"]
    given: dict[str, str] = {}
    problems: list[str] = []
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals or key not in _KEYS:
            problems.append(f"{word!r} is not KEY=VALUE with a known key: {_choose(key, _KEYS)}")
        elif key in given:
            problems.append(f"{key} is given twice, {given[key]!r} and {value!r}: give it once")
        else:
            given[key] = value
    numbers: dict[str, int] = {}
    for key, least in (("rank", 0), ("step", 1)):
        value = given.get(key)
        if value is None:
            problems.append(f"{key} is not given: add {key}=N")
        elif not re.fullmatch(r"[0-9]{1,12}", value) or int(value) < least:
            problems.append(f"{key}={value} must be a whole number of at least {least}")
        else:
            numbers[key] = int(value)
    phase = given.get("phase", rules.phases[0])
    if phase not in rules.phases:
        problems.append(f"phase={phase} is none of {kind}: {_choose(phase, rules.phases)}")
    seconds = rules.seconds
    if "seconds" in given:
        seconds = _seconds(given["seconds"])
        if rules.seconds is None:
            problems.append(f"seconds={given['seconds']}: {kind} has no duration, leave it out")
        elif seconds is None:
            problems.append(f"seconds={given['seconds']} must be a number from 0 to 86400")
    if problems:
        return None, problems
    return Fault(kind=kind, phase=phase, seconds=seconds, **numbers), []


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 86_400 else None


def phases_of(config: RunConfig) -> tuple[str, ...]:
    """The phases that every rank of such a run enters: without expert parallelism rows stay where they are, and
    under a pipeline forward and backward are one."""
    absent = set()
    if config.parallel.ep * config.parallel.etp == 1:
        absent.add("exchange")
    if config.parallel.pp > 1:
        absent.add("backward")
    return tuple(phase for phase in PHASES if phase not in absent)


def problems_in_run(
    faults: Sequence[Fault], *, world_size: int, steps: int, phases: Sequence[str]
) -> list[str]:
    """Why some of `faults` could never happen in a run of so many ranks and steps that has only `phases`."""
    problems: list[str] = []
    for fault in faults:
        if fault.rank >= world_size:
            problems.append(f"{str(fault)!r}: rank must be below {world_size}, the number of ranks")
        if fault.step > steps:
            problems.append(f"{str(fault)!r}: step must be at most train.steps={steps}")
        if fault.phase not in phases:
            problems.append(f"{str(fault)!r}: this run has no such phase: use {', '.join(phases)}")
    return problems


def draw(
    seed: int,
    kinds: Sequence[str],
    *,
    world_size: int,
    steps: int,
    mean_steps_between: float,
    phases: Sequence[str] = PHASES,
) -> tuple[Fault, ...]:
    """A list by chance, the same for the same arguments: kind, rank and phase evenly, gaps exponentially.

    A longer run begins with the faults of a shorter one. No two faults are in one step.

    Raises:
        ValueError: an unknown kind, one that has none of `phases`, or a size out of range.
    """
    problems = [f"{kind!r}: {_choose(kind, tuple(KINDS))}" for kind in kinds if kind not in KINDS]
    problems += [
        f"{kind} needs a phase of {', '.join(KINDS[kind].phases)}, this run has {', '.join(phases)}"
        for kind in kinds
        if kind in KINDS and not set(KINDS[kind].phases) & set(phases)
    ]
    if not kinds:
        problems.append("no kind of fault is named")
    if world_size < 1:
        problems.append(f"world_size={world_size} must be at least 1")
    if not 1 <= mean_steps_between < math.inf:
        problems.append(f"mean_steps_between={mean_steps_between} must be at least 1")
    if problems:
        raise ValueError(_listed(problems))
    rng = random.Random(f"moesys chaos {seed}")
    faults: list[Fault] = []
    step = 0
    while True:
        step += max(1, round(rng.expovariate(1 / mean_steps_between)))
        if step > steps:
            return tuple(faults)
        faults.append(_any_fault(rng, rng.choice(kinds), step, world_size, phases))


def spread(
    seed: int,
    kind: str,
    count: int,
    *,
    world_size: int,
    every_steps: int,
    phases: Sequence[str] = PHASES,
) -> tuple[Fault, ...]:
    """`count` faults of one kind, rank and phase by chance, so far apart that each finds the job recovered.

    With a checkpoint every `every_steps`: the first comes after two, and two or more come between any two.
    """
    rng = random.Random(f"moesys chaos {seed} {kind}")
    return tuple(
        _any_fault(
            rng,
            kind,
            (2 + 3 * index) * every_steps + 1 + rng.randrange(every_steps),
            world_size,
            phases,
        )
        for index in range(count)
    )


def _any_fault(
    rng: random.Random, kind: str, step: int, world_size: int, phases: Sequence[str]
) -> Fault:
    rules = KINDS[kind]
    return Fault(
        kind=kind,
        rank=rng.randrange(world_size),
        step=step,
        phase=rng.choice([phase for phase in rules.phases if phase in phases]),
        seconds=rules.seconds,
    )


def _choose(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"


def _listed(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"faults: {problems[0]}"
    return "\n".join([f"faults: {len(problems)} problems", *(f"  - {p}" for p in problems)])
