"""The best plan of a batch that there is, by branch and bound: a yardstick for six sequences on four ranks or less. Pure.

It is the best of all plans in which `plan.problems` finds nothing wrong: each sequence as a whole in one micro-step, on any
number of ranks in any order of their ring; any number of micro-steps, and of pieces in any order within each. Best by
`cost.in_step_s` where ranks meet in every layer, by `cost.free_s` where they do not.

Ranks are alike: what a plan's first pieces leave to those that follow is what ranks have, whichever these are.

Shapes: S sequences, R ranks.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.fit import check_fits
from moesys.plan.batch.plan import BatchPlan, MicroStep, Piece, batch_plan
from moesys.plan.placement import Integers
from moesys.plan.zigzag import most_ring_tokens, ring_tokens

ROUNDING = 1e-12
"""A plan is better by more than this part, or it is not."""


class _Rank(NamedTuple):
    busy_s: float
    """Where ranks meet, in this micro-step; else in all."""
    room: int
    """Tokens, in this micro-step; as many as all sequences to come have are enough."""
    used: bool
    """In this micro-step."""
    rank: int


class _Begun(NamedTuple):
    """A plan of some of the sequences."""

    to_come: tuple[int, ...]
    """Sequences, the longest first."""
    ranks: tuple[_Rank, ...]
    """In order of what they have."""
    steps: tuple[MicroStep, ...]


def optimum(
    lengths_S: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts, *, meets: bool
) -> BatchPlan:
    """Raises ValueError for a sequence that does not fit."""
    check_fits(lengths_S.tolist(), num_ranks, capacity_tokens)
    by_length = np.argsort(-lengths_S, kind="stable")
    sequences = tuple(by_length[lengths_S[by_length] > 0].tolist())
    search = _Search(lengths_S, num_ranks, capacity_tokens, costs, meets)
    _, steps = _best_steps(search, sequences, {(): (0.0, ())}) if meets else search.best(sequences)
    return batch_plan(lengths_S, num_ranks, steps)


_Best = tuple[float, tuple[MicroStep, ...]]
"""Seconds, and micro-steps."""


def _best_steps(
    search: "_Search", sequences: tuple[int, ...], known: dict[tuple[int, ...], _Best]
) -> _Best:
    """Of ranks that meet: each micro-step for itself, over all ways to share out the sequences."""
    if sequences not in known:
        first, *others = sequences
        best: _Best = math.inf, ()
        for number in range(len(others), -1, -1):
            for chosen in itertools.combinations(others, number):
                rest = tuple(other for other in others if other not in chosen)
                rest_s, rest_steps = _best_steps(search, rest, known)
                step_s, step = search.best((first, *chosen), best[0] - rest_s)
                if step_s + rest_s < best[0] * (1 - ROUNDING):
                    best = step_s + rest_s, (*step, *rest_steps)
        known[sequences] = best
    return known[sequences]


class _Search:
    def __init__(
        self,
        lengths_S: Integers,
        num_ranks: int,
        capacity_tokens: int,
        costs: BatchCosts,
        meets: bool,
    ) -> None:
        self._lengths: list[int] = lengths_S.tolist()
        self._num_ranks, self._capacity, self._meets = num_ranks, capacity_tokens, meets
        self._start_s = costs.micro_step_s
        sizes = range(1, num_ranks + 1)
        most_SR = [[most_ring_tokens(length, size) for size in sizes] for length in self._lengths]
        seconds_SR = np.where(
            np.array(most_SR).reshape(-1, num_ranks) <= capacity_tokens,
            costs.rank_s(lengths_S[:, None], sizes),
            np.inf,
        )
        self._seconds: list[list[float]] = seconds_SR.tolist()
        self._rings = [
            [
                (ring, tokens, seconds)
                for size in sizes
                if (seconds := float(seconds_SR[sequence, size - 1])) < math.inf
                for ring, tokens in _rings(length, size, num_ranks)
            ]
            for sequence, length in enumerate(self._lengths)
        ]
        self._least_area_s: list[float] = (seconds_SR * sizes).min(1).tolist()

    def best(self, sequences: tuple[int, ...], below_s: float = math.inf) -> _Best:
        """In one micro-step if ranks meet, else in any number; inf if none takes less than `below_s`."""
        self._best: _Best = below_s, ()
        self._completed: dict[tuple[int, ...], list[list[float]]] = {}
        start = (self._start_s, self._capacity, True) if self._meets else (0.0, 0, False)
        ranks = tuple(_Rank(*start, rank) for rank in range(self._num_ranks))
        self._complete(_Begun(sequences, ranks, ((),) if self._meets else ()))
        return self._best if self._best[1] else (math.inf, ())

    def _complete(self, begun: _Begun) -> None:
        """In every way, the most promising first, but those that cannot be better than the best so far."""
        if not begun.to_come:
            self._best = self._bound_s(begun), begun.steps
            return
        nexts = list(self._nexts(begun))
        bounds = sorted((self._bound_s(after), index) for index, after in enumerate(nexts))
        for bound_s, index in bounds:
            if bound_s >= self._best[0] * (1 - ROUNDING):
                break
            if not self._as_good_was_completed(nexts[index]):
                self._complete(nexts[index])

    def _bound_s(self, begun: _Begun) -> float:
        """No plan that begins so takes less."""
        busy = [rank.busy_s for rank in begun.ranks]
        area_s = sum(busy) + sum(self._least_area_s[sequence] for sequence in begun.to_come)
        if not self._meets:
            room = sum(rank.room for rank in begun.ranks if rank.used)
            tokens = sum(self._lengths[sequence] for sequence in begun.to_come)
            area_s += self._start_s * max(0, -(-(tokens - room) // self._capacity))
        ends_s = (
            min(map(float.__add__, busy, self._seconds[sequence])) for sequence in begun.to_come
        )
        return max(area_s / len(busy), busy[-1], *ends_s)

    def _as_good_was_completed(self, begun: _Begun) -> bool:
        """With as much to come, and no rank that has less time or room."""
        has = [number for rank in begun.ranks for number in (rank.busy_s, -rank.room, -rank.used)]
        others = self._completed.setdefault(begun.to_come, [])
        if others and (np.array(others) <= has).all(1).any():
            return True
        others.append(has)
        return False

    def _nexts(self, begun: _Begun) -> Iterator[_Begun]:
        """With one sequence more; of those with as many tokens the first stands for all."""
        if self._meets:
            yield from self._with(begun, begun.to_come[0])
            return
        first = {self._lengths[sequence]: sequence for sequence in reversed(begun.to_come)}
        ranks = tuple(rank._replace(room=self._capacity, used=False) for rank in begun.ranks)
        opened = begun._replace(ranks=ranks, steps=(*begun.steps, ()))
        for sequence in first.values():
            if self._start_s:
                yield from self._with(begun, sequence)
            yield from self._with(opened, sequence, begun.ranks if self._start_s else None)

    def _with(
        self, begun: _Begun, sequence: int, before: tuple[_Rank, ...] | None = None
    ) -> Iterator[_Begun]:
        """The sequence in the last micro-step, on any ranks that have room; not on ranks that all had it in the micro-step `before`,
        which took no longer to go on with."""
        to_come = tuple(other for other in begun.to_come if other != sequence)
        enough = sum(self._lengths[other] for other in to_come)
        for ring, tokens, piece_s in self._rings[sequence]:
            has = [begun.ranks[at] for at in ring]
            needs = list(zip(ring, tokens, strict=True))
            if any(begun.ranks[at].room < count for at, count in needs):
                continue
            if before and all(before[at].used and before[at].room >= count for at, count in needs):
                continue
            if any(
                at and at - 1 not in ring and begun.ranks[at - 1][:3] == begun.ranks[at][:3]
                for at in ring
            ):
                continue
            begin_s = [rank.busy_s + (0.0 if rank.used else self._start_s) for rank in has]
            if not self._meets:
                begin_s = [max(begin_s)] * len(ring)
            if max(begin_s) + piece_s >= self._best[0] * (1 - ROUNDING):
                continue
            ranks = list(begun.ranks)
            for (at, count), busy_s in zip(needs, begin_s, strict=True):
                ranks[at] = _Rank(busy_s + piece_s, ranks[at].room - count, True, ranks[at].rank)
            kept = sorted(rank._replace(room=min(rank.room, enough)) for rank in ranks)
            piece = Piece(sequence, tuple(rank.rank for rank in has))
            yield _Begun(to_come, tuple(kept), (*begun.steps[:-1], (*begun.steps[-1], piece)))


def _rings(length: int, size: int, num_ranks: int) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Rings, and the tokens of each of their ranks; of orders in which each rank has as many, one."""
    tokens = ring_tokens(length, size).tolist()
    told_apart = {
        tuple(sorted(zip(ring, tokens, strict=True))): ring
        for ring in itertools.permutations(range(num_ranks), size)
    }
    for ring in told_apart.values():
        yield ring, tokens
