"""Boxes inside a tensor: the arithmetic of sharding, without tensors. Pure."""

import math
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """The box offsets[d] <= index < offsets[d] + shape[d]; of a 0-d tensor, its one element."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Self:
        return cls(offsets=(0,) * len(shape), shape=shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def intersect(self, other: "Region") -> "Region | None":
        """The common box, None if it has no element."""
        start = tuple(map(max, self.offsets, other.offsets))
        stop = tuple(
            min(a + m, b + n)
            for a, m, b, n in zip(self.offsets, self.shape, other.offsets, other.shape, strict=True)
        )
        shape = tuple(end - begin for begin, end in zip(start, stop, strict=True))
        return Region(offsets=start, shape=shape) if all(n > 0 for n in shape) else None

    def within(self, outer: "Region") -> tuple[slice, ...]:
        """The index that cuts this box out of a tensor that holds `outer`."""
        return tuple(
            slice(a - b, a - b + n)
            for a, b, n in zip(self.offsets, outer.offsets, self.shape, strict=True)
        )

    def split(self, max_numel: int) -> "list[Region]":
        """Cut into boxes of at most max(1, max_numel) elements, each contiguous in this box's row-major order."""
        if self.numel <= max(1, max_numel):
            return [self]
        dim = next(d for d, n in enumerate(self.shape) if n > 1)
        rows_per_part = max(1, max_numel // (self.numel // self.shape[dim]))
        parts: list[Region] = []
        for start in range(0, self.shape[dim], rows_per_part):
            rows = min(rows_per_part, self.shape[dim] - start)
            part = Region(
                offsets=(*self.offsets[:dim], self.offsets[dim] + start, *self.offsets[dim + 1 :]),
                shape=(*self.shape[:dim], rows, *self.shape[dim + 1 :]),
            )
            parts += part.split(max_numel)
        return parts
