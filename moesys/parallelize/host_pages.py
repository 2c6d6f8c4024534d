"""Host memory for what leaves a device for a while, and the way there and back.

On a GPU memory is pinned and bytes travel on streams of their own; on a CPU a copy is done when it returns.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PAGE_BYTES = 8 * 2**20


class HostPages:
    """Pages of one size: what one user gives back fits the next, whatever that has, so there are never more than were in use at
    once."""

    def __init__(self, device: torch.device, page_bytes: int = PAGE_BYTES) -> None:
        self.page_bytes = page_bytes
        self.made = 0
        self._is_pinned = device.type == "cuda"
        self._free: list[Tensor] = []

    @property
    def in_use(self) -> int:
        return self.made - len(self._free)

    def take(self) -> Tensor:
        """uint8 [page_bytes], with anything in it."""
        if self._free:
            return self._free.pop()
        self.made += 1
        return torch.empty(self.page_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)

    def give(self, pages: Iterable[Tensor]) -> None:
        """Back. Whoever takes them writes to them after what the device was asked to read from them before."""
        self._free += pages


class Stack:
    """Bytes laid one behind the other in pages, so that of all that is laid a part of one page is lost."""

    def __init__(self, pages: HostPages) -> None:
        self._source = pages
        self._pages: list[Tensor] = []
        self._room = 0
        """Left in the last page."""

    def room_for(self, num_bytes: int) -> list[Tensor]:
        """So many bytes: slices of pages."""
        slices: list[Tensor] = []
        while num_bytes:
            if not self._room:
                self._pages.append(self._source.take())
                self._room = self._source.page_bytes
            begin = self._source.page_bytes - self._room
            length = min(num_bytes, self._room)
            slices.append(self._pages[-1][begin : begin + length])
            self._room -= length
            num_bytes -= length
        return slices

    def clear(self) -> None:
        """Give all pages back."""
        pages, self._pages, self._room = self._pages, [], 0
        self._source.give(pages)


class Lane:
    """One way between a device and the host."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reached: torch.cuda.Event | None = None

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Within, copies are this lane's: they begin once all that the device has been asked to compute is done."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
        self._reached = torch.cuda.Event()
        self._reached.record(self._stream)

    def wait(self) -> None:
        """What the device is asked to compute from here on begins once this lane's copies are done. The host goes on."""
        if self._stream is not None and self._reached is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._reached)
