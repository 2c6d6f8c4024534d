"""Owners by load: level memory, level load of what is not copied."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.plan.sharding import (
    first_owners,
    heterogeneous_sharding,
    moved,
    owned_at_most,
)
from tests.plan.placements import layers_on_ranks, random_loads


def owned(owners, ranks: int) -> np.ndarray:
    return sum(np.bincount(owner_E, minlength=ranks) for owner_E in owners)


@settings(deadline=None, max_examples=200)
@given(*layers_on_ranks(), st.integers(0, 5))
def test_every_expert_has_an_owner_and_no_rank_too_many(rng, sizes, ranks, per_node, degree):
    loads = [random_loads(rng, n).astype(float) for n in sizes]
    for owners in (
        heterogeneous_sharding(loads, ranks, per_node, degree),
        first_owners(sizes, ranks),
    ):
        assert [len(owner_E) for owner_E in owners] == sizes
        assert all(((owner_E >= 0) & (owner_E < ranks)).all() for owner_E in owners)
        assert owned(owners, ranks).max() <= owned_at_most(sizes, ranks)


def test_first_owners_are_those_of_expert_parallelism_where_it_divides():
    assert [owner_E.tolist() for owner_E in first_owners([4, 8], 4)] == [
        [0, 1, 2, 3],
        [0, 0, 1, 1, 2, 2, 3, 3],
    ]


def test_more_ranks_than_experts_of_a_layer():
    assert [owner_E.tolist() for owner_E in first_owners([2, 2], 4)] == [[0, 1], [2, 3]]


def test_loads_that_are_not_copied_are_level():
    """Of two hot experts that are copied anyway, and eight others, rank by rank: 8 + 1, 7 + 2, 6 + 3, 5 + 4."""
    loads = [np.array([100.0, 90.0, 8, 7, 6, 5, 4, 3, 2, 1])]
    owners = heterogeneous_sharding(loads, 5, 1, overlap_degree=2)
    cold_P = np.bincount(owners[0][2:], loads[0][2:], 5)
    assert cold_P.max() <= 9
    even_P = np.bincount(first_owners([10], 5)[0], loads[0], 5)
    plain_P = np.bincount(heterogeneous_sharding(loads, 5, 1, 0)[0], loads[0], 5)
    assert plain_P.max() < even_P.max()


def test_a_layer_may_lie_on_few_ranks():
    """Two layers, one all of whose load is in one expert: the others of that layer lie together, and memory is level over
    both."""
    loads = [np.array([10.0, 0, 0, 0]), np.array([1.0, 1, 1, 1])]
    owners = heterogeneous_sharding(loads, 4, 2, 0)
    assert owned(owners, 4).tolist() == [2, 2, 2, 2]
    of_first = np.bincount(owners[0], minlength=4)
    assert of_first[owners[0][0]] == 1
    assert of_first.max() == 2


def test_what_moved():
    before = [np.array([0, 1]), np.array([1, 0])]
    assert moved(before, [np.array([0, 0]), np.array([1, 0])]) == [(0, 1, 1, 0)]
    assert moved(before, before) == []


def test_owners_of_no_layer():
    with pytest.raises(IndexError):
        first_owners([], 2)[0]
