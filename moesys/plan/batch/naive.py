"""Hybrid data parallelism without balance (ByteScale, 2502.21231, algorithm 1): the baseline. Pure."""

from moesys.plan.batch.fit import best_fit, check_fits, least_ranks
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.placement import Integers


def naive(lengths_S: Integers, num_ranks: int, capacity_tokens: int) -> BatchPlan:
    """Each long sequence on as few ranks as have memory for it, short ones packed; onto the next ranks in turn.

    Raises:
        ValueError: a sequence that does not fit.
    """
    lengths = lengths_S.tolist()
    check_fits(lengths, num_ranks, capacity_tokens)
    used = [sequence for sequence, length in enumerate(lengths) if length]
    long = [sequence for sequence in used if lengths[sequence] > capacity_tokens]
    short = [sequence for sequence in used if lengths[sequence] <= capacity_tokens]
    units = [([sequence], least_ranks(lengths[sequence], capacity_tokens)) for sequence in long]
    units += [(pack, 1) for pack in best_fit(lengths, short, capacity_tokens)]
    steps: list[list[Piece]] = [[]]
    first = 0
    for sequences, size in units:
        if first + size > num_ranks:
            steps.append([])
            first = 0
        ranks = tuple(range(first, first + size))
        steps[-1] += [Piece(sequence, ranks) for sequence in sequences]
        first += size
    return batch_plan(lengths_S, num_ranks, steps)
