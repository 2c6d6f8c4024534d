"""What a check says, and a check: one subject, read and judged within a time limit."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 2**30

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    level: Level
    name: str
    detail: str
    fix: str = ""
    """What to do; empty if all is well, and only then."""

    def __post_init__(self) -> None:
        assert (self.level == "ok") == (self.fix == ""), self


def ok(name: str, detail: str) -> Finding:
    return Finding(level="ok", name=name, detail=detail)


def warn(name: str, detail: str, fix: str) -> Finding:
    """Training works, slower or with less margin."""
    return Finding(level="warn", name=name, detail=detail, fix=fix)


def fail(name: str, detail: str, fix: str) -> Finding:
    """Training does not work, or not for long."""
    return Finding(level="fail", name=name, detail=detail, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Where:
    """What the checks look at."""

    run_dir: Path
    """The folder that runs are written to; it exists."""
    quick: bool = False
    """A preflight: smaller files, fewer repetitions."""


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    """As in docs/doctor.md; its findings have names of their own."""
    limit_s: float
    find: Callable[[Where], Sequence[Finding]]
    """Reads the facts and judges them. What it raises becomes a finding."""


def worst(findings: Iterable[Finding]) -> Level:
    levels = {finding.level for finding in findings}
    return "fail" if "fail" in levels else "warn" if "warn" in levels else "ok"
