"""Slices of sequences of any length: all tokens, evenly, and with even causal work."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.parallel.context import local_positions
from moesys.plan.zigzag import chunk_bounds, most_ring_tokens, ring_tokens

lengths, sizes = st.integers(0, 5000), st.integers(1, 40)


@given(lengths, sizes)
def test_slices_are_all_tokens_as_evenly_as_whole_ones_allow(length: int, size: int) -> None:
    bounds = chunk_bounds(length, size)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, length, 2 * size + 1)
    of_slices = np.diff(bounds)
    assert of_slices.max() - of_slices.min() <= 1
    tokens_L = ring_tokens(length, size)
    assert tokens_L.tolist() == [of_slices[i] + of_slices[-1 - i] for i in range(size)]
    assert tokens_L.sum() == length
    assert most_ring_tokens(length, size) == tokens_L.max()


@given(st.integers(1, 300), st.integers(1, 8))
def test_even_ones_are_those_of_the_static_ring(half: int, size: int) -> None:
    length = 2 * size * half
    bounds = chunk_bounds(length, size)
    for rank in range(size):
        late = 2 * size - 1 - rank
        own = [*range(bounds[rank], bounds[rank + 1]), *range(bounds[late], bounds[late + 1])]
        assert own == local_positions(length, rank, size)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_have_even_causal_work(size: int) -> None:
    """Within what a slice of one token more makes."""
    bounds = chunk_bounds(10_007, size)
    pairs = np.array(
        [
            sum(sum(range(bounds[k] + 1, bounds[k + 1] + 1)) for k in (rank, 2 * size - 1 - rank))
            for rank in range(size)
        ]
    )
    assert pairs.sum() == 10_007 * 10_008 // 2
    assert pairs.max() <= 1.002 * pairs.min()
