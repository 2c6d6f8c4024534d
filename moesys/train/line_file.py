"""A file that lines are added to, on a disk that may be full for a while: nobody who adds one waits or fails."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from moesys.checkpoint.folder import free_bytes
from moesys.train.backlog import Backlog

KEPT_BYTES = 64 << 20
"""Of lines, in memory, while the disk takes none: a day of steps of 5 s with 128 experts in 4 layers."""


class LineFile:
    """Open for appending. Thread-safe."""

    def __init__(
        self, path: Path, tell: Callable[[str], None], kept_bytes: int = KEPT_BYTES
    ) -> None:
        """`tell` is called when the disk begins, and ends, to refuse lines. Raises OSError where it cannot be opened."""
        self.path = path
        self._tell = tell
        self._waiting = Backlog(kept_bytes)
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._is_refused = False
        self._most_waiting = self._dropped_before = 0

    def append(self, line: str) -> None:
        """Add a line, to the file if it can be, with all that waited before; else it waits for the next call."""
        with self._lock:
            self._waiting.add(line.encode() + b"\n")
            try:
                self._write()
            except OSError as error:
                self._refused(error)

    def sync(self) -> None:
        """Put every line on the disk itself. Raises OSError, naming the file, if some must wait."""
        with self._lock:
            try:
                self._write()
                os.fsync(self._descriptor)
            except OSError as error:
                self._refused(error)
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Try once more to write what waits, and tell if it is lost. May be called twice."""
        with self._lock:
            if self._descriptor < 0:
                return
            try:
                self._write()
            except OSError:
                self._tell(
                    f"{self.path}: {len(self._waiting)} records are lost, the disk took none to the end"
                )
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self) -> None:
        while content := self._waiting.next_bytes():
            num_bytes = os.write(self._descriptor, content)
            if not num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting.written(num_bytes)
        if self._is_refused:
            self._is_refused = False
            dropped = self._waiting.num_dropped - self._dropped_before
            lost = (
                f"; the oldest {dropped} of them did not fit into memory and are lost"
                if dropped
                else ""
            )
            self._tell(
                f"{self.path} is written again, with {self._most_waiting} records that waited{lost}"
            )

    def _refused(self, error: OSError) -> None:
        if not self._is_refused:
            self._is_refused = True
            self._most_waiting = 0
            self._dropped_before = self._waiting.num_dropped
            self._tell(
                f"{self.path} cannot be written ({error.strerror}; {free_bytes(self.path.parent):,} bytes are "
                "free): training goes on, and its records wait in memory. Free space there; checkpoints wait for it too"
            )
        dropped = self._waiting.num_dropped - self._dropped_before
        self._most_waiting = max(self._most_waiting, len(self._waiting) + dropped)
