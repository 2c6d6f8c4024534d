"""Hybrid data parallelism with balance (ByteScale, 2502.21231, algorithm 2), for ranks that meet in rings alone. Pure.

Any number of ranks may share a sequence, and ranks may run different numbers of micro-steps. What counts is when each rank has
done all of its work: sequences go, the longest first, to the ranks that have the least so far. So those that work on long
sequences do so at the same time, and short ones fill up what is left.

Shapes: S sequences, R ranks, M micro-steps.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.fit import best_fit, check_fits
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.batch.ring_sizes import ring_sizes
from moesys.plan.placement import Integers
from moesys.plan.zigzag import ring_tokens


def hdp(lengths_S: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts) -> BatchPlan:
    """Raises ValueError for a sequence that does not fit."""
    check_fits(lengths_S.tolist(), num_ranks, capacity_tokens)
    mean_s = float(costs.work_s(lengths_S).sum()) / num_ranks
    sizes_S = ring_sizes(lengths_S, num_ranks, capacity_tokens, costs, mean_s)
    steps = _Steps(num_ranks, capacity_tokens)
    busy = [(0.0, rank) for rank in range(num_ranks)]
    by_length = np.argsort(-lengths_S, kind="stable")
    for sequence in by_length[sizes_S[by_length] > 1].tolist():
        length, size = int(lengths_S[sequence]), int(sizes_S[sequence])
        least = [heapq.heappop(busy) for _ in range(size)]
        end_s = least[-1][0] + float(costs.rank_s(length, size))
        ranks = sorted(rank for _, rank in least)
        for rank in ranks:
            heapq.heappush(busy, (end_s, rank))
        steps.share(sequence, ranks, ring_tokens(length, size))
    short = by_length[sizes_S[by_length] == 1].tolist()
    seconds = costs.rank_s(lengths_S, 1).tolist()
    of_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    for sequence in short:
        busy_s, rank = busy[0]
        of_rank[rank].append(sequence)
        heapq.heapreplace(busy, (busy_s + seconds[sequence], rank))
    steps.pack(lengths_S.tolist(), of_rank)
    return batch_plan(lengths_S, num_ranks, steps.pieces)


class _Steps:
    """Micro-steps as they fill."""

    def __init__(self, num_ranks: int, capacity_tokens: int) -> None:
        self.pieces: list[list[Piece]] = []
        self._room_MR: list[Integers] = []
        self._num_ranks, self._capacity = num_ranks, capacity_tokens

    def share(self, sequence: int, ranks: Sequence[int], tokens: Integers) -> None:
        """In the first micro-step in which all of these ranks have room."""
        at = list(ranks)
        fitting = (i for i, room_R in enumerate(self._room_MR) if (room_R[at] >= tokens).all())
        index = next(fitting, len(self.pieces))
        if index == len(self.pieces):
            self.pieces.append([])
            self._room_MR.append(np.full(self._num_ranks, self._capacity))
        self.pieces[index].append(Piece(sequence, tuple(ranks)))
        self._room_MR[index][at] -= tokens

    def pack(self, lengths: Sequence[int], of_rank: Sequence[Sequence[int]]) -> None:
        """Each rank's own sequences where it has room, and behind."""
        room_RM = (
            np.stack(self._room_MR, axis=1)
            if self._room_MR
            else np.zeros((len(of_rank), 0), dtype=np.int64)
        )
        for rank, (sequences, rooms) in enumerate(zip(of_rank, room_RM.tolist(), strict=True)):
            packs = best_fit(lengths, sequences, self._capacity, rooms)
            self.pieces += [[] for _ in range(len(packs) - len(self.pieces))]
            for index, pack in enumerate(packs):
                self.pieces[index] += [Piece(sequence, (rank,)) for sequence in pack]
