"""Hybrid data parallelism for ranks that meet in every layer, as those of expert parallelism do. Pure.

Every rank runs as many micro-steps, and each takes as long as its slowest rank: the sum over micro-steps of the most work of a
rank is what counts (`cost.in_step_s`). Long sequences with like work share a micro-step; short ones fill the time that the
other ranks of it have, and then micro-steps of their own.

Shapes: S sequences, R ranks, M micro-steps.
"""

import heapq
import math

import numpy as np

from moesys.plan.batch.cost import BatchCosts, in_step_s, rank_seconds
from moesys.plan.batch.fit import check_fits
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.batch.ring_sizes import ring_sizes
from moesys.plan.placement import Integers
from moesys.plan.zigzag import ring_tokens

TRIED = (1.0, 1.1, 1.25, 1.5, 2.0)
"""So many times the fewest micro-steps that have memory for all tokens; more make sequences lie on more ranks."""


def hdp_in_step(
    lengths_S: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts
) -> BatchPlan:
    """The best of several numbers of micro-steps.

    Raises:
        ValueError: a sequence that does not fit.
    """
    check_fits(lengths_S.tolist(), num_ranks, capacity_tokens)
    least = max(1, math.ceil(lengths_S.sum() / (num_ranks * capacity_tokens)))
    numbers = sorted({math.ceil(times * least) for times in TRIED})
    plans = [_planned(lengths_S, num_ranks, capacity_tokens, costs, number) for number in numbers]
    return min(plans, key=lambda plan: in_step_s(rank_seconds(plan, costs)))


def _planned(
    lengths_S: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts, number: int
) -> BatchPlan:
    level_s = float(costs.work_s(lengths_S).sum()) / (num_ranks * number)
    sizes_S = ring_sizes(lengths_S, num_ranks, capacity_tokens, costs, level_s)
    seconds_S = costs.rank_s(lengths_S, np.maximum(sizes_S, 1))
    rows: list[_Row] = []
    long = np.flatnonzero(sizes_S > 1)
    for sequence in long[np.argsort(-seconds_S[long], kind="stable")].tolist():
        size = int(sizes_S[sequence])
        row = next((row for row in rows if row.free >= size), None)
        if row is None:
            rows.append(row := _Row(num_ranks, capacity_tokens, float(seconds_S[sequence])))
        row.share(sequence, int(lengths_S[sequence]), size, float(seconds_S[sequence]))
    rows += [_Row(num_ranks, capacity_tokens, 0.0) for _ in range(number - len(rows))]
    short = np.flatnonzero(sizes_S == 1)
    order = short[np.argsort(-lengths_S[short], kind="stable")].tolist()
    _fill(rows, order, lengths_S.tolist(), seconds_S.tolist())
    return batch_plan(lengths_S, num_ranks, [row.pieces for row in rows])


class _Row:
    """A micro-step as it fills."""

    def __init__(self, num_ranks: int, capacity_tokens: int, level_s: float) -> None:
        self.num_ranks, self.capacity = num_ranks, capacity_tokens
        self.level_s = level_s
        """What it takes in any case."""
        self.free = num_ranks
        """Ranks, the last ones, that share no sequence."""
        self.pieces: list[Piece] = []
        self.busy_s = [0.0] * num_ranks
        self.room = [capacity_tokens] * num_ranks

    def share(self, sequence: int, length: int, size: int, seconds: float) -> None:
        first = self.num_ranks - self.free
        ranks = range(first, first + size)
        self.free -= size
        self.pieces.append(Piece(sequence, tuple(ranks)))
        for rank, tokens in zip(ranks, ring_tokens(length, size).tolist(), strict=True):
            self.busy_s[rank] += seconds
            self.room[rank] -= tokens


def _fill(rows: list[_Row], order: list[int], lengths: list[int], seconds: list[float]) -> None:
    """Each sequence where it makes its micro-step longer by least."""
    places = [
        (busy_s - row.level_s, index, rank)
        for index, row in enumerate(rows)
        for rank, busy_s in enumerate(row.busy_s)
    ]
    heapq.heapify(places)
    for sequence in order:
        full = []
        while places and rows[places[0][1]].room[places[0][2]] < lengths[sequence]:
            full.append(heapq.heappop(places))
        if not places:
            first = rows[-1] if rows else None
            assert first is not None, "there is a row to be full"
            rows.append(_Row(first.num_ranks, first.capacity, 0.0))
            places = [(0.0, len(rows) - 1, rank) for rank in range(first.num_ranks)]
        over_s, index, rank = places[0]
        rows[index].pieces.append(Piece(sequence, (rank,)))
        rows[index].room[rank] -= lengths[sequence]
        heapq.heapreplace(places, (over_s + seconds[sequence], index, rank))
        for place in full:
            heapq.heappush(places, place)
