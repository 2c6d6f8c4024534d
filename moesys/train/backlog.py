"""Lines on their way to a disk that may be full: what waits, in order, in a bounded space. No file in here."""

from collections import deque

_CHUNK_BYTES = 1 << 20


class Backlog:
    """Lines go in whole, bytes come out as the disk takes them. Beyond the bound the oldest whole lines are dropped.

    The line that the disk has a part of stays: its rest comes first, or the file would hold half of it. So does
    the newest.
    """

    def __init__(self, bound_bytes: int) -> None:
        self.bound_bytes = bound_bytes
        self.num_dropped = 0
        """Lines, since the beginning."""
        self.num_bytes = 0
        """That wait."""
        self._lines: deque[bytes] = deque()
        self._done_bytes = 0  # of the first line

    def __len__(self) -> int:
        """Lines that are not wholly on the disk."""
        return len(self._lines)

    def add(self, line: bytes) -> None:
        """`line` ends with a line feed."""
        self._lines.append(line)
        self.num_bytes += len(line)
        while self.num_bytes > self.bound_bytes and len(self._lines) > 1 + bool(self._done_bytes):
            oldest = 1 if self._done_bytes else 0
            self.num_bytes -= len(self._lines[oldest])
            del self._lines[oldest]
            self.num_dropped += 1

    def next_bytes(self) -> bytes:
        """What to write now: the oldest lines, about a MiB of them; nothing if nothing waits."""
        parts, size_bytes = [], 0
        for line in self._lines:
            parts.append(line)
            size_bytes += len(line)
            if size_bytes >= _CHUNK_BYTES:
                break
        return b"".join(parts)[self._done_bytes :]

    def written(self, num_bytes: int) -> None:
        """The disk has taken so many of `next_bytes`."""
        self.num_bytes -= num_bytes
        self._done_bytes += num_bytes
        while self._lines and self._done_bytes >= len(self._lines[0]):
            self._done_bytes -= len(self._lines.popleft())
