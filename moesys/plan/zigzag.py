"""How a sequence of any length is cut for the ranks of a ring, so that causal attention is as much work for each. Pure.

It is cut in 2 * size chunks, as even as whole tokens allow; rank i has chunk i, which sees little, and chunk
2 * size - 1 - i, which sees much (as in Llama 3, 2407.21783, section 3.3.2). With fewer tokens than chunks some are empty.

Shapes: L ranks of a ring.
"""

import numpy as np

from moesys.plan.placement import Integers


def chunk_bounds(length: int, size: int) -> list[int]:
    """Chunk k is from the k-th of these to the next."""
    return [k * length // (2 * size) for k in range(2 * size + 1)]


def local_chunks(seq_len: int, rank: int, size: int) -> tuple[range, range]:
    """The positions of the early and of the late chunk of `rank`."""
    bounds = chunk_bounds(seq_len, size)
    early, late = rank, 2 * size - 1 - rank
    return range(bounds[early], bounds[early + 1]), range(bounds[late], bounds[late + 1])


def ring_tokens(length: int, size: int) -> Integers:
    """int64 [L]: of each rank, their sum is `length`."""
    lengths = np.diff(chunk_bounds(length, size))
    return lengths[:size] + lengths[: size - 1 : -1]


def most_ring_tokens(length: int, size: int) -> int:
    """Of the rank with the most."""
    return length if size == 1 else int(ring_tokens(length, size).max())
