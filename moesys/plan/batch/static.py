"""A mesh of data and context ranks that stays: every sequence is cut for all ranks of a context group. Pure.

Which sequences a group gets in which micro-step is what policies differ in: in order of arrival (`packed`), or such that
micro-batches are as much work (`balanced`).

Shapes: S sequences.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.fit import check_fits
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.placement import Amounts, Integers
from moesys.plan.zigzag import most_ring_tokens

Partition = Callable[[Amounts, int], list[list[int]]]
"""Items, by their amounts, in so many sets whose sums are about equal."""


def context_size(lengths_S: Integers, num_ranks: int, capacity_tokens: int) -> int:
    """The least of `context_sizes`.

    Raises:
        ValueError: there is none.
    """
    check_fits(lengths_S.tolist(), num_ranks, capacity_tokens)
    sizes = context_sizes(lengths_S, num_ranks, capacity_tokens)
    if sizes:
        return sizes[0]
    raise ValueError(
        f"a sequence of {lengths_S.max()} tokens fits no group of ranks of {capacity_tokens} tokens that {num_ranks} ranks "
        "share out in: give ranks more memory"
    )


def context_sizes(lengths_S: Integers, num_ranks: int, capacity_tokens: int) -> list[int]:
    """Divisors of the ranks, ascending, with which the longest sequence fits a context group."""
    longest = int(lengths_S.max(initial=0))
    return [
        size
        for size in range(1, num_ranks + 1)
        if num_ranks % size == 0 and most_ring_tokens(longest, size) <= capacity_tokens
    ]


def packed(lengths_S: Integers, num_ranks: int, capacity_tokens: int, size: int) -> BatchPlan:
    """In order: a micro-batch ends where the next sequence does not fit; groups take them in turn."""
    tokens_S = _most_tokens(lengths_S, size)
    batches: list[list[int]] = [[]]
    room = capacity_tokens
    for sequence in np.flatnonzero(lengths_S).tolist():
        if tokens_S[sequence] > room:
            batches.append([])
            room = capacity_tokens
        batches[-1].append(sequence)
        room -= tokens_S[sequence]
    return _dealt(lengths_S, num_ranks, size, batches)


def balanced(
    lengths_S: Integers,
    num_ranks: int,
    capacity_tokens: int,
    size: int,
    costs: BatchCosts,
    partition: Partition,
) -> BatchPlan:
    """As few micro-batches, as many for each group, as have memory for what the partition puts in each; those with the most
    work first, so that groups have like ones at a time."""
    groups = num_ranks // size
    tokens_S = np.array(_most_tokens(lengths_S, size), dtype=np.int64)
    used = np.flatnonzero(lengths_S)
    work_S = costs.rank_s(lengths_S, size)
    micro_steps = max(1, -(-int(tokens_S.sum()) // (groups * capacity_tokens)))
    while True:
        sets = partition(work_S[used], micro_steps * groups)
        batches = [used[items].tolist() for items in sets]
        if all(tokens_S[batch].sum() <= capacity_tokens for batch in batches):
            break
        micro_steps += max(1, micro_steps // 16)
    batches.sort(key=lambda batch: -float(work_S[batch].sum()))
    return _dealt(lengths_S, num_ranks, size, batches)


def _most_tokens(lengths_S: Integers, size: int) -> list[int]:
    return [most_ring_tokens(length, size) for length in lengths_S.tolist()]


def _dealt(
    lengths_S: Integers, num_ranks: int, size: int, batches: Sequence[Sequence[int]]
) -> BatchPlan:
    """One to each group in turn."""
    groups = num_ranks // size
    steps = [
        [
            Piece(sequence, tuple(range(group * size, (group + 1) * size)))
            for group, batch in enumerate(batches[first : first + groups])
            for sequence in batch
        ]
        for first in range(0, len(batches), groups)
    ]
    return batch_plan(lengths_S, num_ranks, steps)
