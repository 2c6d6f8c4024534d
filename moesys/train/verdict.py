"""Why a job cannot go on: what the ranks reported, judged. No clock, socket or store in here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moesys.train.neighbour import ProcessId

Kind = Literal["died", "failed", "orphaned", "hung", "cut off", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank last said of itself."""

    step: int
    place: str
    """The innermost line of ours in its main thread."""
    collective: str
    is_waiting: bool
    """In that collective."""
    waited_s: float
    """Without any collective completed, while one was under way."""
    unix_s: float
    process: ProcessId | None = None
    """Of this rank, for those on its machine."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What rank `by` found: that another died or is stopped, or that it failed itself, lost the agent that started it,
    waited too long, was cut off."""

    kind: Kind
    about: int
    by: int
    step: int
    text: str = ""


def cause(reports: Sequence[Report]) -> Report | None:
    """The report, of those in the order of their arrival, that the others follow from.

    A rank that was cut off, or gave up a hung collective, leaves too, and one that is stopped is killed after a hang:
    their ends are no cause.
    """
    gave_up = {r.by for r in reports if r.kind in ("failed", "orphaned", "hung", "cut off")}
    gave_up |= {r.about for r in reports if r.kind == "stopped"}
    for report in reports:
        if report.kind in ("failed", "orphaned"):
            return report
        if report.kind == "died" and report.about not in gave_up:
            return report
    for kind in ("hung", "cut off"):
        for report in reports:
            if report.kind == kind:
                return report
    return None


def is_settled(report: Report | None) -> bool:
    """Whether no later report can be the cause: a rank that was cut off does not know by whom."""
    return report is not None and report.kind != "cut off"


def silent_ranks(beats: Mapping[int, Beat], *, limit_s: float) -> dict[int, float]:
    """Rank -> seconds that its last beat is older than the newest, where more than the limit."""
    newest = max((beat.unix_s for beat in beats.values()), default=0.0)
    ages = {rank: newest - beat.unix_s for rank, beat in sorted(beats.items())}
    return {rank: age for rank, age in ages.items() if age > limit_s}


def absent_ranks(beats: Mapping[int, Beat]) -> list[int]:
    """Those who wait in no collective while others do: they are waited for."""
    waiting = [rank for rank, beat in beats.items() if beat.is_waiting]
    return sorted(beats.keys() - set(waiting)) if waiting else []


def sentence(report: Report, beats: Mapping[int, Beat], *, silence_limit_s: float) -> str:
    """One line for a person: which rank, what, at which step, and where it was last seen."""
    rank, beat = report.about, beats.get(report.about)
    step = max(report.step, beat.step if beat else 0)
    seen = f" (last seen at {beat.place}, {beat.collective})" if beat else ""
    if report.kind == "died" and report.text:
        return f"rank {rank} is out of reach at step {step}: {report.text}{seen}"
    if report.kind == "died":
        return f"rank {rank} died at step {step}{seen}"
    if report.kind == "failed":
        return f"rank {rank} failed at step {step}: {report.text}"
    if report.kind == "orphaned":
        return f"rank {rank} lost its launcher at step {step}: {report.text}{seen}"
    silent = silent_ranks(beats, limit_s=silence_limit_s)
    if silent:
        blame = "; " + ", ".join(
            f"rank {r} is silent for {s:.1f} s{_at(beats[r])}" for r, s in silent.items()
        )
    elif absent := absent_ranks(beats):
        blame = "; not in a collective: " + ", ".join(f"rank {r}{_at(beats[r])}" for r in absent)
    else:
        blame = ""
    what = "gave up" if report.kind == "hung" else "was cut off"
    return f"rank {rank} {what} at step {step}: {report.text}{blame}"


def table(beats: Mapping[int, Beat], ranks: Iterable[int]) -> list[str]:
    """The ranks' last collectives, one line each."""
    newest = max((beat.unix_s for beat in beats.values()), default=0.0)
    return [
        f"  rank {rank}: {_line(beats[rank], newest)}"
        if rank in beats
        else f"  rank {rank}: nothing is known"
        for rank in ranks
    ]


def _line(beat: Beat, newest_s: float) -> str:
    state = f"waits {beat.waited_s:.1f} s in" if beat.is_waiting else "last in"
    age = newest_s - beat.unix_s
    said = f", said {age:.1f} s before the others" if age > 1.0 else ""
    return f"step {beat.step}, {state} {beat.collective}, at {beat.place}{said}"


def _at(beat: Beat) -> str:
    return f" (step {beat.step}, {beat.place}, {beat.collective})"
