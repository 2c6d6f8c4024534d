"""The eye outside: sees what a job's processes, output and records do, and when, by the monotonic clock."""

import json
import os
import queue
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from moesys.chaos.inject import marker_path
from moesys.chaos.outcome import Event, Sample
from moesys.chaos.processes import descendants, is_alive, sample, variable
from moesys.train.metrics import FILE_NAME

_SAYS = re.compile(r"(moesys: |warning: |error: |Traceback |\[rank\d+\]: )")
"""How a line begins in which a rank says that something is wrong."""
_SAYING_KINDS = ("anomaly", "straggler", "checkpoint_failed")
"""Records that say so."""
_SCAN_S = 0.2
"""Between looks for new processes, each of which reads all of /proc."""
_SAMPLE_S = 1.0


class Eye:
    """Watches one run folder over all launches of its job; `look` often."""

    def __init__(self, run_dir: Path, num_faults: int) -> None:
        self.events: list[Event] = []
        """In the order in which they were noticed."""
        self.samples: dict[int, list[Sample]] = {}
        """By process: the launchers, and the ranks while they train."""
        self._run_dir = run_dir
        self._unmarked = set(range(num_faults))
        self._ranks: dict[int, int] = {}
        """Rank of each process."""
        self._launcher: int | None = None
        self._is_training = False
        self._lines: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        self._records = _Records(run_dir / FILE_NAME)
        self._scanned_s = self._sampled_s = 0.0

    @property
    def losses(self) -> Mapping[int, float]:
        """Of each step, as the last record of it says."""
        return self._records.losses

    def follow(self, launcher: int, output: IO[str], copy: IO[str]) -> None:
        """A launcher was started; its output goes to `copy` line by line, until it ends."""
        self._launcher = launcher
        self._add("job_started")

        def read() -> None:
            for line in output:
                self._lines.put((time.monotonic(), line))
                copy.write(line)
                copy.flush()

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()

    def look(self) -> None:
        """Take in all that is new."""
        now_s = time.monotonic()
        self._look_at_markers()
        while not self._lines.empty():
            at_s, line = self._lines.get()
            if _SAYS.match(line):
                self.events.append(Event(at_s=at_s, kind="said", text=line.strip()))
        self._look_at_processes(now_s)
        self._look_at_records()

    def end(self, exit_code: int) -> None:
        """The launcher ended."""
        self._reader.join(5.0)  # a process that it left may hold the pipe
        self.look()
        self._launcher = None
        self._add("job_ended", text=str(exit_code))

    def _look_at_markers(self) -> None:
        for ordinal in sorted(self._unmarked):
            path = marker_path(self._run_dir, ordinal)
            if not path.exists():
                continue
            marker = json.loads(path.read_text())
            self._unmarked.discard(ordinal)
            self.events.append(
                Event(
                    at_s=marker["monotonic_s"],
                    kind="fault",
                    rank=marker["fault"]["rank"],
                    step=marker["step"],
                    ordinal=ordinal,
                    text=marker["what"],
                )
            )

    def _look_at_processes(self, now_s: float) -> None:
        for process, rank in list(self._ranks.items()):
            if not is_alive(process):
                del self._ranks[process]
                self._add("ended", rank=rank)
        if self._launcher is not None and now_s - self._scanned_s >= _SCAN_S:
            self._scanned_s = now_s
            for process in descendants(self._launcher):
                rank = variable(process, "RANK")
                if rank is not None and process not in self._ranks and is_alive(process):
                    self._ranks[process] = int(rank)
        if self._launcher is not None and now_s - self._sampled_s >= _SAMPLE_S:
            self._sampled_s = now_s
            for process in (self._launcher, *(self._ranks if self._is_training else ())):
                if (found := sample(process)) is not None:
                    self.samples.setdefault(process, []).append(found)

    def _look_at_records(self) -> None:
        for record in self._records.new():
            kind, step = record["kind"], record.get("step", 0)
            if kind == "train":
                self._is_training = True
                ago_s = max(0.0, time.time() - record["unix_s"])
                at_s = time.monotonic() - ago_s
                self.events.append(Event(at_s=at_s, kind="step", step=step))
            elif kind == "start":
                self._is_training = False
                self._add("start", step=record["resumed_from_step"])
            elif kind in _SAYING_KINDS:
                self._add("said", step=step, text=f"record of kind {kind}")
            elif kind == "stop" and str(record.get("reason", "")).startswith("failed"):
                self._add("said", step=step, text=record["reason"])

    def _add(self, kind: Any, **more: Any) -> None:
        self.events.append(Event(at_s=time.monotonic(), kind=kind, **more))


class _Records:
    """New lines of a metrics.jsonl that restarts and roll backs replace by one with less in it."""

    def __init__(self, path: Path) -> None:
        self.losses: dict[int, float] = {}
        self._path = path
        self._file = (0, 0)
        self._offset = 0
        self._seen: set[int] = set()
        """Hashes of lines: what is kept is kept as it was."""

    def new(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                return self._read(file)
        except FileNotFoundError:
            return []

    def _read(self, file: IO[bytes]) -> list[dict[str, Any]]:
        stat = os.fstat(file.fileno())
        if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._offset:
            self._file, self._offset = (stat.st_dev, stat.st_ino), 0
        file.seek(self._offset)
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = [line for line in whole.splitlines() if hash(line) not in self._seen]
        self._seen.update(map(hash, lines))
        records = [json.loads(line) for line in lines]
        self.losses |= {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
        return records
