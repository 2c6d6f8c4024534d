"""Where a step's time goes: named sections, by wall clock on CPUs and by events on GPUs."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


class StepTimes:
    """Time of steps that leave no record of their own, for the next record: a ledger needs all of it."""

    def __init__(self) -> None:
        self._step_ms, self._data_ms = 0.0, 0.0
        self._first_step_ms: float | None = None
        self._is_first = True

    def add(self, step_s: float, sections_ms: Mapping[str, float]) -> None:
        """A step of which no record may follow."""
        if self._is_first:
            self._first_step_ms, self._is_first = step_s * 1e3, False
        self._step_ms += step_s * 1e3
        self._data_ms += sections_ms.get("data", 0.0)

    def fields(self, step_s: float, sections_ms: Mapping[str, float]) -> dict[str, float]:
        """For the record of this step, the one last added: what the ones before took, and a start's first step."""
        told = {
            "unrecorded_step_ms": max(0.0, self._step_ms - step_s * 1e3),
            "unrecorded_data_ms": max(0.0, self._data_ms - sections_ms.get("data", 0.0)),
            "first_step_ms": self._first_step_ms or 0.0,
        }
        self._step_ms, self._data_ms, self._first_step_ms = 0.0, 0.0, None
        return {name: ms for name, ms in told.items() if ms > 0}


class SectionTimer:
    """Adds up milliseconds per section until `read`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_enter: Callable[[str], None] | None = None
        """Called with a section's name before its time begins."""
        self._wall_ms: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def section(self, name: str, on_host: bool = False) -> Iterator[None]:
        """Time the block. On a GPU only events are recorded, no sync, unless the work is `on_host`."""
        if self.on_enter is not None:
            self.on_enter(name)
        if self.device.type == "cuda" and not on_host:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._wall_ms[name] += (time.perf_counter() - began) * 1e3

    def read(self) -> dict[str, float]:
        """Milliseconds per section since the last read. Waits for the device."""
        for name, start, end in self._events:
            end.synchronize()
            self._wall_ms[name] += start.elapsed_time(end)
        self._events = []
        sections, self._wall_ms = dict(self._wall_ms), defaultdict(float)
        return sections
