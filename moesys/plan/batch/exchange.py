"""A plan of few sequences, better by exchanges: one of them is cut otherwise, or comes elsewhere. Pure.

Laying the longest first, under level after level, is as good as can be known where there are many sequences. Of few, each counts:
the neighbours of a plan are looked at until none is better, and then those of a plan a few steps off (iterated local search,
Lourenço, Martin and Stützle 2003), with the same draws always.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from moesys.plan.batch.row import Row
from moesys.plan.batch.ways import Batch

MOST_LAID = 10_000
"""Pieces in micro-steps, and plans, that are looked at."""
MOST_SIZES = 8
"""Of a ring, that are tried: the next ones to what it has."""
STEPS_OFF = (4, 16)
FEW = 8
"""Sequences with which it pays."""
ENOUGH = 1.01
"""So many times what is the least possible is not looked at further."""


class Cut(NamedTuple):
    """A sequence, and the number of its way."""

    sequence: int
    way: int


Order = tuple[Cut, ...]
"""A micro-step, as its sequences are laid."""


class Exchange:
    def __init__(
        self, batch: Batch, seconds: Callable[[Sequence[Row]], float], *, waits: bool
    ) -> None:
        """`seconds` is of all micro-steps; with `waits` (as Row's) there is one."""
        self._batch, self._seconds, self._waits = batch, seconds, waits
        self._left = MOST_LAID
        self._known: dict[Order, Row | None] = {}

    def better(self, rows: list[Row], good_s: float) -> list[Row]:
        """The best that is found, or the first that takes no longer than `good_s`."""
        if len(self._batch.by_length) > FEW:
            return rows
        draw = random.Random(0)
        best, best_s = rows, self._seconds(rows)
        best_orders = orders = [self._order(row) for row in rows if row.pieces]
        while best_s > good_s and self._left > 0:
            orders, rows, seconds = self._climbed(orders)
            if seconds < best_s * (1 - 1e-9):
                best, best_s, best_orders = rows, seconds, orders
            orders = best_orders
            for _ in range(draw.choice(STEPS_OFF)):
                orders = self._drawn(orders, draw)
        return best

    def _order(self, row: Row) -> Order:
        ways = self._batch.ways
        return tuple(
            Cut(sequence, ways(sequence).sizes.index(len(ranks))) for sequence, ranks in row.pieces
        )

    def _climbed(self, orders: list[Order]) -> tuple[list[Order], list[Row], float]:
        """From neighbour to better neighbour; infinite seconds where memory is short all the way."""
        rows, seconds = self._laid(orders)
        better = True
        while better and self._left > 0:
            better = False
            for neighbour in self._neighbours(orders):
                after, after_s = self._laid(neighbour)
                if after_s < seconds * (1 - 1e-9):
                    orders, rows, seconds, better = neighbour, after, after_s, True
                if better or self._left <= 0:
                    break
        return orders, rows, seconds

    def _laid(self, orders: Sequence[Order]) -> tuple[list[Row], float]:
        """Infinite seconds where memory is short."""
        self._left -= 1
        rows: list[Row] = []
        for order in orders:
            if order not in self._known:
                self._known[order] = self._row(order)
            row = self._known[order]
            if row is None:
                return [], math.inf
            rows.append(row)
        return rows, self._seconds(rows)

    def _row(self, order: Order) -> Row | None:
        self._left -= len(order)
        row = Row(self._batch, math.inf, waits=self._waits)
        for sequence, way in order:
            length, ways = self._batch.lengths[sequence], self._batch.ways(sequence)
            if ways.sizes[way] == 1:
                if not row.take(sequence, length, ways.seconds[way]):
                    return None
            elif (ring := row.ring_under(ways, range(way, way + 1))) is None:
                return None
            else:
                row.share(sequence, length, ways, ring)
        return row

    def _neighbours(self, orders: Sequence[Order]) -> Iterator[list[Order]]:
        """With one sequence cut otherwise, elsewhere, or both."""
        for index, order in enumerate(orders):
            for at, cut in enumerate(order):
                others = _without(orders, index, at)
                for way in self._ways(cut):
                    for to in self._micro_steps(others):
                        for place in range(len(others[to]) + 1 if to < len(others) else 1):
                            yield _with(others, to, place, Cut(cut.sequence, way))

    def _drawn(self, orders: Sequence[Order], draw: random.Random) -> list[Order]:
        """One of the neighbours."""
        index = draw.randrange(len(orders))
        at = draw.randrange(len(orders[index]))
        cut, others = orders[index][at], _without(orders, index, at)
        to = draw.choice(self._micro_steps(others))
        place = draw.randrange(len(others[to]) + 1) if to < len(others) else 0
        return _with(others, to, place, Cut(cut.sequence, draw.choice(self._ways(cut))))

    def _micro_steps(self, others: Sequence[Order]) -> range:
        """One more where memory counts."""
        return range(max(1, len(others) + (not self._waits)))

    def _ways(self, cut: Cut) -> list[int]:
        number = len(self._batch.ways(cut.sequence).sizes)
        return sorted(range(number), key=lambda other: (abs(other - cut.way), other))[:MOST_SIZES]


def _without(orders: Sequence[Order], index: int, at: int) -> list[Order]:
    rest = orders[index][:at] + orders[index][at + 1 :]
    return [*orders[:index], *([rest] if rest else []), *orders[index + 1 :]]


def _with(orders: Sequence[Order], to: int, place: int, cut: Cut) -> list[Order]:
    if to == len(orders):
        return [*orders, (cut,)]
    return [*orders[:to], (*orders[to][:place], cut, *orders[to][place:]), *orders[to + 1 :]]
