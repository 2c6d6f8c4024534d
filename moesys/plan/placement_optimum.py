"""The best copies that there are, by trying all: a yardstick for small cases. Pure.

Shapes: E experts, P ranks, C copies that a rank may hold, B ways to hold them, A sets of ranks.
"""

import itertools

import numpy as np

from moesys.plan.placement import Amounts, Integers, Placement


def least_maximum(loads_E: Amounts, placement: Placement) -> float:
    """Of the ranks' loads, if each expert's may be split over its holders at will. Exact; P at most about 12.

    Ranks A cannot get rid of the load of experts that they alone hold: the least maximum is the most of that per rank of
    any A (max-flow min-cut).
    """
    mask_E = np.left_shift(1, placement.owner_E)
    for rank, row in enumerate(placement.copies_PC):
        for expert in row[row >= 0]:
            mask_E[expert] |= 1 << rank
    return float(_least_maxima(loads_E, mask_E[None], placement.num_ranks)[0])


def best_copies(loads_E: Amounts, owner_E: Integers, num_ranks: int, most_copies: int) -> float:
    """The least maximum over all placements with these owners."""
    choices = [
        list(itertools.combinations(others, min(most_copies, len(others))))
        for others in (np.flatnonzero(owner_E != rank).tolist() for rank in range(num_ranks))
    ]
    own_E = np.left_shift(1, owner_E)
    masks_BE = np.stack([own_E])
    for rank, sets in enumerate(choices):
        added_XE = np.zeros((len(sets), len(loads_E)), dtype=np.int64)
        for x, experts in enumerate(sets):
            added_XE[x, list(experts)] = 1 << rank
        masks_BE = np.unique((masks_BE[:, None] | added_XE).reshape(-1, len(loads_E)), axis=0)
    return float(_least_maxima(loads_E, masks_BE, num_ranks).min())


def _least_maxima(loads_E: Amounts, masks_BE: Integers, num_ranks: int) -> Amounts:
    worst_B = np.zeros(len(masks_BE))
    for ranks in range(1, 1 << num_ranks):
        confined_BE = (masks_BE & ~ranks) == 0
        worst_B = np.maximum(worst_B, confined_BE @ loads_E / ranks.bit_count())
    return worst_B
