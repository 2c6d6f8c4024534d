"""How many groups of each size ranks form, and which lengths each size gets, within a time: a mixed-integer program. Pure.

FlexSP (2412.01523) names every group that there might be, 127 of 64 ranks, and asks for the least time of the
slowest. All groups of a size are alike, so that such a program has as many equal answers as there are orders of them, and its
relaxation, which opens a sliver of each, says nothing. Here groups of a size are counted, and the time is given: what all of
them together have must be enough, and of pieces that take more than a half, or a third, of a group no more than one, or two,
go to each. Whether it is enough for each alone is for the caller to see.

Shapes: B buckets of like sequences, G sizes of groups.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesys.plan.placement import Amounts, Integers

MOST_NODES = 200
"""Of the search tree, after which there is no answer: a limit that is the same on every machine, unlike one of seconds."""
PARTS = (2, 3)


class GroupCounts(NamedTuple):
    """An answer."""

    sequences_BG: Integers
    """Of each bucket, to the groups of each size."""
    groups_G: Integers


class Bucket(NamedTuple):
    """Sequences of like lengths."""

    sequences: int
    seconds_G: Amounts
    """Of a piece, the mean of its sequences."""
    tokens_G: Integers
    """Of a piece on the rank with the most, the most of its sequences."""


def group_counts(
    buckets: list[Bucket], sizes_G: Integers, num_ranks: int, capacity_tokens: int, most_s: float
) -> GroupCounts | None:
    """None if there is none, or none was found.

    Raises:
        ValueError: scipy is not installed.
    """
    try:
        from scipy.optimize import milp
    except ImportError:
        raise ValueError(
            "plans by FlexSP need scipy, which is not installed: pip install 'moesys[planning]', or choose another policy"
        ) from None
    sequences_B = np.array([bucket.sequences for bucket in buckets])
    time_BG = np.stack([bucket.seconds_G for bucket in buckets]) / most_s
    tokens_BG = np.stack([bucket.tokens_G for bucket in buckets])
    num_buckets, num_sizes = time_BG.shape
    loads: list[tuple[NDArray[Any], int]] = [(time_BG, 1), (tokens_BG / capacity_tokens, 1)]
    for parts in PARTS:
        # Whole parts that a piece fills and exceeds: those of a group's pieces are fewer than it has parts.
        loads.append((np.floor(parts * time_BG * (1 - 1e-9)), parts - 1))
        loads.append((parts * tokens_BG // (capacity_tokens + 1), parts - 1))
    fits_BG = (time_BG <= 1) & (tokens_BG <= capacity_tokens)
    most = np.concatenate([(sequences_B[:, None] * fits_BG).ravel(), num_ranks // sizes_G])
    ranks = np.concatenate([np.zeros(num_buckets * num_sizes), sizes_G])
    of_bucket = np.kron(np.eye(num_buckets), np.ones(num_sizes))
    all_B = np.hstack([of_bucket, np.zeros((num_buckets, num_sizes))])
    within = np.vstack([_of_sizes(load_BG, room) for load_BG, room in loads])
    found = milp(
        np.zeros(len(most)),
        integrality=np.ones(len(most)),
        bounds=(0, most),
        constraints=[
            (all_B, sequences_B, sequences_B),
            (within, -np.inf, 0),
            (ranks[None], -np.inf, num_ranks),
        ],
        options={"node_limit": MOST_NODES},
    )
    if found.x is None:
        return None
    answer = np.rint(found.x).astype(np.int64)
    sequences_BG, groups_G = np.split(answer, [num_buckets * num_sizes])
    return GroupCounts(sequences_BG.reshape(num_buckets, num_sizes), groups_G)


def _of_sizes(load_BG: NDArray[Any], room: int) -> Amounts:
    """A row for each size: what its groups have to take, less the room of so many."""
    num_buckets, num_sizes = load_BG.shape
    rows_GBG = np.zeros((num_sizes, num_buckets, num_sizes))
    at = np.arange(num_sizes)
    rows_GBG[at, :, at] = load_BG.T
    return np.hstack([rows_GBG.reshape(num_sizes, -1), -room * np.eye(num_sizes)])
