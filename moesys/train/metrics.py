"""metrics.jsonl: the one true record of a run. Everything else (console, TensorBoard, W&B, report)
is a view of the same records.

One JSON object per line, written by rank 0, in order of step, every step at most once: `start` (one per
(re)start), `train`, `eval`, `checkpoint`, `checkpoint_failed`, `mixing` and `codecs` (before their step), `anomaly`, `straggler`, `undone` (what a resume took back), `goodput` and `stop`.
`unix_s` says when; times are *_ms or *_s, sizes *_bytes. A number that is not finite is written as null, so that every line is strict JSON.
"""

import json
import math
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from moesys.report.goodput import Books
from moesys.report.records import EXPERT_KEYS, parse_line, read_records, without_experts
from moesys.train.line_file import LineFile
from moesys.train.undone import UNDONE_BY_RESUME, Undone

FILE_NAME = "metrics.jsonl"


class Sink(Protocol):
    """Another view of the records, in the order in which they are written."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """The open metrics.jsonl of a run folder; made by rank 0 only.

    Opening drops what a resume undoes: `train`, `eval` and `checkpoint` records of steps after
    `resume_step` (0 = from the beginning), `anomaly` records after the first `resume_anomalies`, and a last line
    torn by a kill. One `undone` record for each start
    that loses some says how many steps and how much time they took. A record is on its way to the
    disk when `write` returns, so a later kill of this process cannot lose it.

    A disk that takes no records ends nothing: they wait in memory (see `LineFile`) and come in their order. `sync`
    raises then, so that no checkpoint is ahead of them. A sink that raises is reported once as a warning and left out
    from then on, or with OSError tried again: no view of a run may end it.

    Raises:
        ValueError: the file that is already there has a line that is not a record (names the line).
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int = 0,
        resume_anomalies: int = 0,
        sinks: Iterable[Sink] = (),
        check_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """`check_turn` raises if another job has taken the folder over; asked before the file is replaced."""
        self.path = Path(run_dir) / FILE_NAME
        self._sinks = list(sinks)
        self._troubled: set[int] = set()  # sinks that a disk refuses
        self._last_step = resume_step
        self._check_turn = check_turn
        self.books = Books()
        """The run's time so far, earlier starts included."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _rewind(self.path, Undone(resume_step, resume_anomalies), self.books, check_turn)
        self._file = LineFile(self.path, _tell)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and hand it to the sinks; raises no OSError. `kind` is required, `unix_s` is now where it is not given,
        EXPERT_KEYS are moved last."""
        complete = {key: value for key, value in record.items() if key not in EXPERT_KEYS}
        complete.setdefault("unix_s", time.time())
        complete |= {key: record[key] for key in EXPERT_KEYS if key in record}
        if complete["kind"] == "train":
            assert complete["step"] > self._last_step, (
                f"step {complete['step']} after {self._last_step}"
            )
            self._last_step = complete["step"]
        self._file.append(_dump(complete))
        self.books.add(complete)
        for sink in tuple(self._sinks):
            self._guard(sink, lambda sink=sink: sink.write(complete))

    def rewind(self, step: int) -> None:
        """Drop what a roll back to `step` undoes, as a resume does; anomalies stay."""
        self._check_turn()
        self._file.sync()
        self._file.close()
        self.books = Books()
        _rewind(self.path, Undone(step, None), self.books, self._check_turn)
        self._file = LineFile(self.path, _tell)
        self._last_step = step

    def sync(self) -> None:
        """Wait until every record is on the disk itself, safe from a node that loses power. Any thread.

        Raises OSError if the disk does not take them.
        """
        self._file.sync()

    def close(self) -> None:
        """Close the file and every sink. May be called twice."""
        self._file.close()
        for sink in tuple(self._sinks):
            self._guard(sink, sink.close)
        self._sinks.clear()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _guard(self, sink: Sink, call: Any) -> None:
        try:
            call()
            self._troubled.discard(id(sink))
        except OSError as error:
            if id(sink) not in self._troubled:
                self._troubled.add(id(sink))
                _tell(
                    f"{type(sink).__name__} cannot write ({error}) and tries again; {self.path} goes on"
                )
        except Exception as error:
            self._sinks.remove(sink)
            warnings.warn(
                f"{type(sink).__name__} failed and is off for the rest of this run ({error!r}); "
                f"{self.path} goes on",
                stacklevel=3,
            )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every record of a metrics.jsonl, in order; a torn last line is left out.

    Raises:
        ValueError: another line is not a record; names the file and the line number.
    """
    return list(read_records(Path(path)))


def clear_unfinished(run_dir: Path) -> None:
    """Remove what a job that died, or was taken over, wrote beside metrics.jsonl."""
    for beside in run_dir.glob(f"{FILE_NAME}.tmp-*"):
        beside.unlink(missing_ok=True)


def _tell(text: str) -> None:
    with suppress(OSError):  # the console may be a file on the same disk
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _rewind(path: Path, undone: Undone, books: Books, check_turn: Callable[[], None]) -> None:
    beside = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    with path.open("rb") as old, beside.open("wb") as new:

        def tell_undone() -> None:
            if (told := undone.take()) is not None:
                books.add(told)
                new.write(_dump(told).encode() + b"\n")

        for number, line in enumerate(old, start=1):
            # A torn line must be judged whole, and without_experts leaves it so.
            record = parse_line(without_experts(line), path=path, number=number)
            if record is None or undone.add(record):
                continue
            if record["kind"] not in UNDONE_BY_RESUME:
                tell_undone()
            books.add(record)
            new.write(line if line.endswith(b"\n") else line + b"\n")
        tell_undone()
        new.flush()
        os.fsync(new.fileno())
    check_turn()
    os.replace(beside, path)


def _dump(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(record), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
