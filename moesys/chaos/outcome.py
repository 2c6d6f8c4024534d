"""From what was seen, with its times, to what became of each fault. Pure."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moesys.chaos.faults import KINDS, Fault


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something seen from outside."""

    at_s: float
    """By the machine's monotonic clock."""
    kind: Literal["fault", "said", "ended", "start", "step", "job_started", "job_ended"]
    """A fault happened; a rank said that something is wrong; a rank's process ended; the ranks started (again) from
    `step`; `step` was done; the launcher started or ended."""
    rank: int | None = None
    step: int = 0
    ordinal: int = -1
    """Of the fault."""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one fault."""

    fault: Fault
    happened: bool
    found_s: float | None = None
    """From the fault to the first that a rank said, or the first other end of a rank. None: nobody noticed."""
    found_by: str = ""
    back_s: float | None = None
    """From the fault to the end of the next new step, or of the job."""
    steps_lost: int = 0
    """Done before the fault, and again after it."""
    restarts: int = 0
    """Starts of the ranks because of it, without a new launcher."""
    relaunches: int = 0
    """The launcher gave up and had to be started again."""
    is_overtaken: bool = False
    """The next fault came before a new step: what followed is told there."""

    @property
    def survived(self) -> bool:
        """The job went on by itself."""
        is_back = self.back_s is not None or self.is_overtaken
        return self.happened and is_back and self.relaunches == 0


def outcomes(faults: Sequence[Fault], events: Iterable[Event]) -> list[Outcome]:
    """One for each fault, in their order. A start between two faults counts for the earlier one."""
    ordered = sorted(events, key=lambda event: event.at_s)
    happened = {event.ordinal: event for event in ordered if event.kind == "fault"}
    return [
        _outcome(fault, happened[ordinal], ordered)
        if ordinal in happened
        else Outcome(fault=fault, happened=False)
        for ordinal, fault in enumerate(faults)
    ]


def _outcome(fault: Fault, begin: Event, ordered: Sequence[Event]) -> Outcome:
    before = [event for event in ordered if event.at_s <= begin.at_s]
    after = [event for event in ordered if event.at_s > begin.at_s]
    next_fault = next((i for i, event in enumerate(after) if event.kind == "fault"), None)
    after = after[:next_fault]  # what comes then may be of that one
    starts = [i for i, event in enumerate(after) if event.kind == "start"]
    # Another rank's record of the step before the fault may come a moment later.
    done = max(_last_step(before), begin.step - (fault.phase != "save"))
    steps_lost = 0
    for at in starts:
        steps_lost = max(steps_lost, max(done, _last_step(after[:at])) - after[at].step)
    if starts:
        # Steps before it were done with the fault, found later or by ranks that had not seen it yet.
        done = max(done, _last_step(after[: starts[-1]]))
        recovering = after[starts[-1] :]
    else:
        recovering = [e for e in after if e.kind == "job_ended" or not KINDS[fault.kind].ends_job]
    back = next((event for event in recovering if _is_back(event, done)), None)
    found = _found(fault, after)
    if found is not None and back is not None and found.at_s > back.at_s:
        found = None
    relaunches = sum(event.kind == "job_started" for event in after)
    return Outcome(
        fault=fault,
        happened=True,
        found_s=None if found is None else found.at_s - begin.at_s,
        found_by="" if found is None else _name(found),
        back_s=None if back is None else back.at_s - begin.at_s,
        steps_lost=steps_lost,
        restarts=max(0, len(starts) - relaunches),
        relaunches=relaunches,
        is_overtaken=next_fault is not None and back is None,
    )


def _last_step(events: Iterable[Event]) -> int:
    return max((event.step for event in events if event.kind == "step"), default=0)


def _is_back(event: Event, done: int) -> bool:
    if event.kind == "step":
        return event.step > done
    return event.kind == "job_ended" and event.text == "0"


def _found(fault: Fault, after: Iterable[Event]) -> Event | None:
    """The first that somebody noticed; the end of a rank that was killed is the fault itself."""
    is_victims_end_due = KINDS[fault.kind].ends_rank
    for event in after:
        if is_victims_end_due and event.kind == "ended" and event.rank == fault.rank:
            is_victims_end_due = False
        elif event.kind in ("ended", "said"):
            return event
    return None


def _name(event: Event) -> str:
    return f"rank {event.rank} ended" if event.kind == "ended" else event.text


def first_difference(plain: Mapping[int, float], faulted: Mapping[int, float]) -> int | None:
    """The first step whose loss is not bitwise the same, or is in one run only; None if there is none."""
    steps = sorted(plain.keys() | faulted.keys())
    return next((step for step in steps if plain.get(step) != faulted.get(step)), None)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A process at one moment."""

    num_descriptors: int
    memory_bytes: int


def growth(samples: Sequence[Sample]) -> Sample | None:
    """Of a process over its life: median of the last quarter less that of the second, so that neither its start nor
    one sample decides. None for fewer than 8 samples."""
    if len(samples) < 8:
        return None
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]

    def grown(of: str) -> int:
        first, last = (statistics.median(getattr(s, of) for s in part) for part in (early, late))
        return round(last - first)

    return Sample(num_descriptors=grown("num_descriptors"), memory_bytes=grown("memory_bytes"))


Row = dict[str, Any]
COLUMNS: Mapping[str, str] = {
    "fault": "fault",
    "seeds": "times",
    "survived": "survived",
    "found_s": "found after, s",
    "found_max_s": "at most",
    "back_s": "next step after, s",
    "back_max_s": "at most",
    "steps_lost": "steps lost",
    "steps_lost_max": "at most",
    "exact": "losses equal",
}
"""Keys of a row, and how a table heads them."""


def row_of(kind: str, found: Sequence[Outcome], *, exact: bool) -> Row:
    """The line of the table about faults of one kind: medians and worst cases of those that happened."""
    happened = [outcome for outcome in found if outcome.happened]
    found_s = [o.found_s for o in happened if o.found_s is not None]
    back_s = [o.back_s for o in happened if o.back_s is not None]
    lost = [o.steps_lost for o in happened]
    return {
        "fault": kind,
        "seeds": len(happened),
        "survived": sum(outcome.survived for outcome in happened),
        "found_s": _median(found_s),
        "found_max_s": max(found_s, default=None),
        "back_s": _median(back_s),
        "back_max_s": max(back_s, default=None),
        "steps_lost": _median(lost),
        "steps_lost_max": max(lost, default=None),
        "exact": exact,
    }


def _median(values: Sequence[float]) -> float | None:
    return float(statistics.median(values)) if values else None


def survived_pct(rows: Sequence[Row]) -> float:
    """Of all faults that happened."""
    happened = sum(row["seeds"] for row in rows)
    return 100 * sum(row["survived"] for row in rows) / happened if happened else 0.0


def markdown(rows: Sequence[Row]) -> str:
    """The table for people."""
    lines = [COLUMNS.values(), ["---"] * len(COLUMNS)]
    lines += [[_cell(row[key]) for key in COLUMNS] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
