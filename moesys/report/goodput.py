"""Where a run's wall-clock time went, over all its starts, from its records alone. Pure.

Time is counted in whole milliseconds, so the parts sum to the wall time exactly. Inside a start, what the records
state (steps, waits, evaluations) is taken from them and `other` is the rest; where clocks disagree and they state
more than there was, they are shortened in proportion. Between two starts the time is cut at the moments that the
start record names.

The last sign of life of a start is its last record, a stop because of a failure left out: what a killed
rank did after it left no result and counts as `down`. After a stop that says "done" nobody waits for the run, so
the time until a later start is no part of the wall time.

With `train.log_every_steps` above 1, steps after the last record of a killed start are not known: `down`.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moesys.report.numbers import duration, is_number
from moesys.report.records import time_of, unix_s_of

PARTS = {
    "productive": "steps whose result the run still has, without their wait for data",
    "repeated": "steps, evaluations and saves that a resume undid",
    "down": "from the last sign of life to the next submission or, where none is told, start",
    "queue": "from the submission to the process",
    "start_up": "from the process to its start record, without load",
    "load": "reading a checkpoint",
    "checkpoint": "steps waited for a save",
    "evaluation": "on held-out data",
    "data": "steps waited for their samples",
    "hang": "from the last record before a hang until it was given up",
    "other": "the rest between steps",
}
"""What each part of the wall time is, in the order in which they are shown."""

_SUBMISSION_SLACK_MS = 2_000
"""A submission's time is told in whole seconds."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A run's wall time by part."""

    parts_ms: Mapping[str, int]
    """One for each of PARTS; they sum to wall_ms."""
    wall_ms: int
    starts: int
    steps_lost: int
    """Trained, then undone by a resume."""
    start_up_s: Mapping[str, float]
    """Seconds of each part of a start, over all starts; `first_step` is part of productive or repeated."""

    @property
    def goodput_pct(self) -> float:
        """Productive share of the wall time; 0 for no time."""
        return 100 * self.parts_ms["productive"] / self.wall_ms if self.wall_ms else 0.0

    def as_dict(self) -> dict[str, Any]:
        """As `goodput` records, summary.json and `moesys report --json` have it."""
        return {
            "goodput_pct": self.goodput_pct,
            "wall_s": self.wall_ms / 1e3,
            **{f"{part}_s": ms / 1e3 for part, ms in self.parts_ms.items()},
            "starts": self.starts,
            "steps_lost": self.steps_lost,
            "start_up_parts_s": dict(self.start_up_s),
        }


class Books:
    """Adds up records in the order of the file; `ledger` may be asked for at any time."""

    def __init__(self) -> None:
        self._parts_ms = dict.fromkeys(PARTS, 0)
        self._wall_ms = 0
        self._told_ms: dict[str, float] = defaultdict(float)
        """Since `_settled_ms`."""
        self._settled_ms = 0
        self._now_ms: int | None = None
        self._is_wanted = False
        """The run is not done, so the time until its next start is lost."""
        self._starts = 0
        self._steps_lost = 0
        self._start_up_s: dict[str, float] = defaultdict(float)

    def add(self, record: Mapping[str, Any]) -> None:
        """The next record. One that tells no time is left out, so files from before records had one say nothing."""
        unix_s = time_of(record)
        if unix_s is None or record["kind"] == "goodput":  # which is made of the stop after it
            return
        at_ms = round(unix_s * 1e3)
        if self._now_ms is not None:
            at_ms = max(at_ms, self._now_ms)  # clocks of nodes differ, and are set back
        if record["kind"] == "start":
            self._start(record, at_ms)
            return
        if self._now_ms is None:  # a file without its beginning
            self._settled_ms, self._now_ms, self._is_wanted = at_ms, at_ms, True
        if record["kind"] == "stop":
            self._stop(record, at_ms)
        else:
            self._tell(record)
        self._now_ms = at_ms

    def ledger(self, last: Mapping[str, Any] | None = None) -> Ledger:
        """So far; with `last`, as if that record had come."""
        books = copy.deepcopy(self)
        if last is not None:
            books.add(last)
        books._settle()
        return Ledger(
            parts_ms=books._parts_ms,
            wall_ms=books._wall_ms,
            starts=books._starts,
            steps_lost=books._steps_lost,
            start_up_s=dict(books._start_up_s),
        )

    def _tell(self, record: Mapping[str, Any]) -> None:
        told = self._told_ms
        match record["kind"]:
            case "train":
                step_ms = _ms(record, "step_ms") + _ms(record, "unrecorded_step_ms")
                data_ms = _ms(record, "data_ms") + _ms(record, "unrecorded_data_ms")
                told["data"] += min(data_ms, step_ms)
                told["productive"] += max(0.0, step_ms - data_ms)
                self._start_up_s["first_step"] += _ms(record, "first_step_ms") / 1e3
            case "eval":
                told["evaluation"] += _ms(record, "eval_ms")
            case "mixing" | "codecs" as kind:
                told["evaluation"] += _ms(record, f"{kind}_ms")
            case "checkpoint":
                told["checkpoint"] += _ms(record, "checkpoint_ms")
            case "undone":
                told["repeated"] += _ms(record, "spent_ms")
                self._steps_lost += record.get("steps", 0)
                self._start_up_s["first_step"] += _ms(record, "first_step_ms") / 1e3

    def _start(self, record: Mapping[str, Any], at_ms: int) -> None:
        self._settle()
        earliest_ms, now_ms = self._now_ms, self._now_ms or 0
        told_ms = _moment_ms(record, "created_unix_s")
        begin_ms = created_ms = at_ms if told_ms is None else min(max(told_ms, now_ms), at_ms)
        submitted_ms = _moment_ms(record, "submitted_unix_s")
        # One from before the last sign of life is of an earlier start.
        if submitted_ms is not None and submitted_ms >= now_ms - _SUBMISSION_SLACK_MS:
            begin_ms = min(max(submitted_ms, now_ms), created_ms)
        if earliest_ms is not None and self._is_wanted:
            self._move("down", begin_ms - now_ms)
        parts_s = record.get("start_up_s") or {}
        load_ms = min(round(1e3 * parts_s.get("load", 0.0)), at_ms - created_ms)
        queue_ms = created_ms - begin_ms
        self._move("queue", queue_ms)
        self._move("load", load_ms)
        self._move("start_up", at_ms - created_ms - load_ms)
        for part, seconds in ({"queue": 0.0} | parts_s | {"queue": queue_ms / 1e3}).items():
            self._start_up_s[part] += seconds
        self._settled_ms = self._now_ms = at_ms
        self._is_wanted = True
        self._starts += 1

    def _stop(self, record: Mapping[str, Any], at_ms: int) -> None:
        reason = str(record.get("reason", ""))
        if reason.startswith("failed"):
            self._settle()
            part = "hang" if record.get("cause") == "hung" else "down"
            self._move(part, at_ms - self._settled_ms)
            self._settled_ms = at_ms
        self._is_wanted = reason != "done"

    def _settle(self) -> None:
        """Share out the time since the last settlement among what was told since then."""
        if self._now_ms is None:
            return
        wall_ms = self._now_ms - self._settled_ms
        total_ms = sum(self._told_ms.values())
        scale = min(1.0, wall_ms / total_ms) if total_ms else 1.0
        for part, ms in self._told_ms.items():
            given_ms = min(int(ms * scale), wall_ms)
            self._move(part, given_ms)
            wall_ms -= given_ms
        self._move("other", wall_ms)
        self._told_ms.clear()
        self._settled_ms = self._now_ms

    def _move(self, part: str, ms: int) -> None:
        self._parts_ms[part] += ms
        self._wall_ms += ms


def ledger_of(records: Iterable[Mapping[str, Any]]) -> Ledger:
    """Of a whole run."""
    books = Books()
    for record in records:
        books.add(record)
    return books.ledger()


def goodput_lines(goodput: Mapping[str, Any]) -> tuple[str, str]:
    """`Ledger.as_dict` in two lines for people: the share, and where the rest went, most first."""
    spent_s = {part: goodput.get(f"{part}_s", 0.0) for part in PARTS}
    lost = sorted(
        (part for part in PARTS if part != "productive" and spent_s[part] >= 0.0005),
        key=lambda part: -spent_s[part],
    )
    told = ", ".join(f"{part.replace('_', '-')} {duration(spent_s[part])}" for part in lost)
    starts, steps = goodput.get("starts", 0), goodput.get("steps_lost", 0)
    return (
        f"goodput {goodput['goodput_pct']:.1f} %: productive {duration(spent_s['productive'])} of "
        f"{duration(goodput['wall_s'])}; {starts} {'start' if starts == 1 else 'starts'}, "
        f"{steps} {'step' if steps == 1 else 'steps'} lost",
        f"the rest: {told or 'none'}",
    )


def _moment_ms(record: Mapping[str, Any], name: str) -> int | None:
    unix_s = unix_s_of(record.get(name))
    return None if unix_s is None else round(unix_s * 1e3)


def _ms(record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    return max(0.0, float(value)) if is_number(value) else 0.0
