"""What a resume takes back, added up for the `undone` record that stays in its place. Pure."""

from collections.abc import Mapping
from typing import Any

from moesys.report.numbers import is_number
from moesys.report.records import time_of

UNDONE_BY_RESUME = frozenset({"train", "eval", "checkpoint", "anomaly", "mixing", "codecs"})
"""A start or a stop happened, whatever is resumed from; these are about steps that will be made again."""

_TIMES = {
    "train": ("step_ms", "unrecorded_step_ms"),
    "eval": ("eval_ms",),
    "checkpoint": ("checkpoint_ms",),
    "mixing": ("mixing_ms",),
    "codecs": ("codecs_ms",),
}


class Undone:
    """Fed with a file's records in order; keeps what those of steps after `resume_step` took.

    Anomalies are numbered through the run: those after the first `resume_anomalies` will be found again. None = a
    roll back, which undoes steps but no anomaly.
    """

    def __init__(self, resume_step: int, resume_anomalies: int | None = 0) -> None:
        self._resume_step = resume_step
        self._resume_anomalies = resume_anomalies
        self._last_step = 0
        self._last: dict[str, Any] | None = None

    def add(self, record: Mapping[str, Any]) -> bool:
        """Whether the resume undoes this record, which then counts."""
        kind, step = record["kind"], record.get("step", 0)
        if kind == "anomaly":
            return self._resume_anomalies is not None and record["number"] > self._resume_anomalies
        if kind == "start":
            self._last_step = record.get("resumed_from_step") or 0
        before, is_undone = self._last_step, kind in UNDONE_BY_RESUME and step > self._resume_step
        if kind == "train":
            self._last_step = step
        if not is_undone:
            return False
        if self._last is None:
            self._last = {
                "kind": "undone",
                "resumed_from_step": self._resume_step,
                "last_step": 0,
                "steps": 0,
                "spent_ms": 0.0,
            }
        last = self._last
        last["spent_ms"] += sum(_number(record.get(name)) for name in _TIMES[kind])
        last["last_step"] = max(last["last_step"], step)
        if kind == "train":
            last["steps"] += step - max(before, self._resume_step)
        if "first_step_ms" in record:
            last["first_step_ms"] = record["first_step_ms"]
        if (unix_s := time_of(record)) is not None:
            last["unix_s"] = unix_s
        return True

    def take(self) -> dict[str, Any] | None:
        """The `undone` record of what was added since the last call; None for nothing."""
        taken, self._last = self._last, None
        return taken


def _number(value: Any) -> float:
    return float(value) if is_number(value) else 0.0
