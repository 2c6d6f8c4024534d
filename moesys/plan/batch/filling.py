"""Sequences laid into micro-steps up to given levels: the longest first, each on as few ranks as bring it under a level. Pure.

This is MULTIFIT (Coffman, Garey and Johnson, 1978) for tasks that may be cut, as in Turek, Wolf and Yu's dual approximation
(1992): for a level that is too low some sequence goes over it, for one that is too high time is left; so several are tried.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moesys.plan.batch.row import Row
from moesys.plan.batch.ways import Batch

SLACKS = (0.002, 0.004, 0.008, 0.015, 0.022, 0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2, 0.27, 0.35, 0.45, 0.6, 0.8, 1.1, 1.5)  # fmt: skip
"""By so much of them levels are raised, since neither time nor memory can be filled to the last."""
FIRST = SLACKS.index(0.03)
CUTS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1)
"""A piece takes no more of its level, where there are ranks enough for it."""
NEAR = (
    *((0, slack, 0) for slack in (-1, 1, -2, 2)),
    *((levels, 0, 0) for levels in (-1, 1)),
    *((0, slack, 0) for slack in (-3, 3, 4, -4)),
    *((0, 0, cut) for cut in (-1, 1)),
)
GOOD = 1.003
"""So many times what is the least possible, or what was taken for it, is good enough."""
MOST_LAID = 150_000
"""Sequences, in all that is tried; a ring takes as long as so many, and as so many for each micro-step that is looked at:"""
RING, ROW = 32, 2
FEW = 16
"""Sequences for which all levels are tried with all slacks and cuts."""
TINY = 0.005
"""A sequence that takes less of a level is not cut."""


class Filling:
    """Micro-steps as they fill up to their levels; more of them where memory is short."""

    def __init__(self, batch: Batch, levels_s: Sequence[float], cut: float, *, waits: bool) -> None:
        """With `waits` (as Row's) there is one level."""
        self._batch, self._cut, self._waits = batch, cut, waits
        self.rows = [self._row(level_s) for level_s in levels_s]
        self.laid = len(batch.by_length)

    def fill(self, below_s: float) -> bool:
        """Whether the levels stay below so much together; if not, sequences are left over."""
        batch, rows = self._batch, self.rows
        tiny_s = TINY * max((row.level_s for row in rows), default=0.0)
        for place, sequence in enumerate(batch.by_length):
            length, alone_s = batch.lengths[sequence], batch.alone_s[sequence]
            if any(
                row.least_busy_s + alone_s <= row.level_s
                and alone_s <= self._cut * row.level_s
                and row.take(sequence, length, alone_s)
                for row in rows
            ):
                continue
            if alone_s <= tiny_s and any(
                row.take(sequence, length, alone_s, over=True)
                for row in sorted(rows, key=lambda row: row.least_busy_s - row.level_s)
            ):
                continue
            self.laid += RING + ROW * len(rows)
            self._cut_up(place)
            if sum(row.level_s for row in rows) >= below_s:
                return False
        return True

    def _row(self, level_s: float) -> Row:
        return Row(self._batch, level_s, waits=self._waits)

    def _cut_up(self, place: int) -> None:
        """The sequence under the level of a micro-step, else where it goes over it the least, else in a micro-step of its own."""
        sequence = self._batch.by_length[place]
        length, ways = self._batch.lengths[sequence], self._batch.ways(sequence)
        looked_at = [ways.within(row.level_s, self._cut) for row in self.rows]
        rings = [
            row.ring_under(ways, ways_) for row, ways_ in zip(self.rows, looked_at, strict=True)
        ]
        under = [(ring.way, index) for index, ring in enumerate(rings) if ring is not None]
        if under:
            _, index = min(under)
            ring = rings[index]
            assert ring is not None
            self.rows[index].share(sequence, length, ways, ring)
            return
        over = [
            (*row.least_over(ways, ways_), index)
            for index, (row, ways_) in enumerate(zip(self.rows, looked_at, strict=True))
        ]
        over_s, way, index = min(over, default=(math.inf, 0, 0))
        if over_s > ways.quick_s and not self._waits:
            self.rows.append(row := self._row(ways.quick_s))
            row.share(
                sequence, length, ways, row.least_busy(ways, ways.seconds.index(ways.quick_s))
            )
            return
        row = self.rows[index]
        row.level_s += max(over_s, self._short_s(place), 0.001 * row.level_s)
        if row.take(sequence, length, self._batch.alone_s[sequence]):
            return
        ring = row.ring_under(ways, ways.within(row.level_s, self._cut))
        row.share(sequence, length, ways, ring or row.least_busy(ways, way))

    def _short_s(self, place: int) -> float:
        """By so much levels are too low for what is left."""
        rest_s = self._batch.rest_s[place]
        token_s = rest_s / self._batch.rest_tokens[place]
        usable_s = sum(row.usable_s(token_s) for row in self.rows)
        return (rest_s - usable_s) / self._batch.num_ranks


class _Place(NamedTuple):
    """Of what is tried."""

    levels: int
    slack: int
    cut: int

    def after(self, step: tuple[int, int, int]) -> "_Place":
        return _Place(self.levels + step[0], self.slack + step[1], self.cut + step[2])


class Fillings:
    """What was tried with the levels of each of `tried`, of which like ones are next to each other."""

    def __init__(
        self,
        batch: Batch,
        tried: Sequence[Sequence[float]],
        seconds: Callable[[Sequence[Row]], float],
        *,
        good_s: float,
        most_laid: int = MOST_LAID,
        waits: bool,
    ) -> None:
        """
        Args:
            seconds: of all micro-steps, no less than the sum of their levels.
            good_s: of a plan that is not looked at further.
            most_laid: sequences, in all that is tried.
        """
        self._batch, self._tried, self._seconds, self._waits = batch, tried, seconds, waits
        self._seen: set[_Place] = set()
        self._good_s, self._left = good_s, most_laid
        self._best_at = _Place(0, FIRST, 0)
        self._best: list[Row] = []
        self._best_s = math.inf

    def search(self) -> list[Row]:
        """The best, once one is good, no other is near it, or enough was laid."""
        is_few = len(self._batch.by_length) <= FEW
        slacks = range(len(SLACKS)) if is_few else (FIRST,)
        for cut in range(len(CUTS)):
            of_tried = range(len(self._tried)) if is_few or not cut else (self._best_at.levels,)
            for levels, slack in itertools.product(of_tried, slacks):
                self._improves(_Place(levels, slack, cut))
            while any(self._improves(self._best_at.after(step)) for step in NEAR):
                pass
        return self._best

    def _improves(self, at: _Place) -> bool:
        sizes = _Place(len(self._tried), len(SLACKS), len(CUTS))
        if at in self._seen or not all(0 <= i < size for i, size in zip(at, sizes, strict=True)):
            return False
        if self._best_s <= self._good_s or (self._best and self._left <= 0):
            return False
        self._seen.add(at)
        levels_s = [level_s * (1 + SLACKS[at.slack]) for level_s in self._tried[at.levels]]
        filling = Filling(self._batch, levels_s, CUTS[at.cut], waits=self._waits)
        complete = filling.fill(self._best_s)
        self._left -= filling.laid
        if not complete or (seconds := self._seconds(filling.rows)) >= self._best_s:
            return False
        self._best_at, self._best, self._best_s = at, filling.rows, seconds
        return True
