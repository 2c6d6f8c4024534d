"""Over how many ranks each sequence goes. Pure.

Shapes: S sequences.
"""

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.fit import least_ranks
from moesys.plan.placement import Integers


def ring_sizes(
    lengths_S: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts, most_s: float
) -> Integers:
    """int64 [S]: as many ranks as have memory, and as bring the work of each down to `most_s`; 0 of an empty sequence.

    A rank has a token or more.
    """
    work_s = costs.work_s(lengths_S)
    by_work_S = np.ceil(work_s / max(most_s, 1e-30) * (1 - 1e-9)).astype(np.int64)
    sizes_S = np.clip(by_work_S, 1, np.minimum(num_ranks, np.maximum(lengths_S, 1)))
    for sequence in np.flatnonzero(lengths_S > capacity_tokens).tolist():
        least = least_ranks(int(lengths_S[sequence]), capacity_tokens)
        sizes_S[sequence] = max(int(sizes_S[sequence]), least)
    return np.where(lengths_S > 0, sizes_S, 0)
