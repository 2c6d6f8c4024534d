"""Hybrid data parallelism with balance (ByteScale, 2502.21231, algorithm 2), for ranks that meet in rings alone. Pure.

Any number of ranks may share a sequence, and ranks may run different numbers of micro-steps. What counts is when each rank has
done all of its work: sequences go, the longest first, to the ranks that have the least so far. So those that work on long
sequences do so at the same time, and short ones fill up what is left.

Shapes: S sequences.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.exchange import ENOUGH, Exchange
from moesys.plan.batch.filling import GOOD, Fillings
from moesys.plan.batch.fit import best_fit
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.batch.row import Row
from moesys.plan.batch.seconds import BatchSeconds
from moesys.plan.batch.ways import Batch
from moesys.plan.placement import Integers


def hdp(lengths_S: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts) -> BatchPlan:
    """Raises ValueError for a sequence that does not fit."""
    share_s = costs.micro_step_s / capacity_tokens
    batch = Batch(
        lengths_S, num_ranks, capacity_tokens, replace(costs, token_s=costs.token_s + share_s)
    )
    if not batch.by_length:
        return batch_plan(lengths_S, num_ranks, [])
    even_s = math.fsum(batch.areas_s) / num_ranks
    least_s = max(even_s, batch.ways(batch.by_length[0]).least_s)
    fillings = Fillings(
        batch, [[least_s]], lambda rows: rows[0].most_busy_s, good_s=GOOD * least_s, waits=True
    )

    seconds = BatchSeconds(lengths_S, num_ranks, costs)

    def best(rows: Sequence[Row]) -> tuple[float, list[list[Piece]]]:
        arranged = (_micro_steps(batch, rows[0].pieces, apart=apart) for apart in (False, True))
        return min(((seconds.free(steps), steps) for steps in arranged), key=lambda each: each[0])

    exchange = Exchange(batch, lambda rows: best(rows)[0], waits=True)
    rows = exchange.better(fillings.search(), ENOUGH * least_s)
    return batch_plan(lengths_S, num_ranks, best(rows)[1])


def _micro_steps(batch: Batch, pieces: Sequence[Piece], *, apart: bool) -> list[list[Piece]]:
    """Each rank's pieces in this order, up to its last ring; behind that its own sequences where they fit best.

    With `apart` no other pieces are in a ring's micro-step, so that its ranks wait for none of them; else as many as fit.
    """
    last_ring = {
        rank: at for at, piece in enumerate(pieces) if len(piece.ranks) > 1 for rank in piece.ranks
    }
    steps: list[list[Piece]] = []
    number = [0] * batch.num_ranks
    room = [batch.capacity_tokens] * batch.num_ranks
    last: list[tuple[int, ...]] = [()] * batch.num_ranks
    """Ranks of the last piece."""
    alone: list[list[int]] = [[] for _ in range(batch.num_ranks)]
    for at, (sequence, ranks) in enumerate(pieces):
        if at > last_ring.get(ranks[0], -1):
            alone[ranks[0]].append(sequence)
            continue
        tokens = batch.ring_tokens(sequence, len(ranks))
        step = max(
            number[rank] + (room[rank] < count or (apart and last[rank] not in ((), ranks)))
            for rank, count in zip(ranks, tokens, strict=True)
        )
        for rank, count in zip(ranks, tokens, strict=True):
            if number[rank] < step:
                number[rank], room[rank] = step, batch.capacity_tokens
            room[rank] -= count
            last[rank] = ranks
        steps += [[] for _ in range(step + 1 - len(steps))]
        steps[step].append(Piece(sequence, ranks))
    for rank, sequences in enumerate(alone):
        is_left = not apart or len(last[rank]) < 2
        packs = best_fit(
            batch.lengths, sequences, batch.capacity_tokens, [room[rank] if is_left else 0]
        )
        steps += [[] for _ in range(number[rank] + len(packs) - len(steps))]
        for step, pack in enumerate(packs, start=number[rank]):
            steps[step] += [Piece(sequence, (rank,)) for sequence in pack]
    return steps
