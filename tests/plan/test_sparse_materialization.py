"""The rules of Hecate and FasterMoE for copies: which experts, how many, where."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.plan.placement import even_owners, placement_of, problems
from moesys.plan.sparse_materialization import hottest_everywhere, sparse_materialization
from tests.plan.placements import random_loads, random_owners, seeds


@settings(deadline=None, max_examples=200)
@given(
    seeds(),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(0, 6),
)
def test_a_plan_keeps_within_its_budget(rng, experts, ranks, copies, per_node, degree):
    loads_ME = random_loads(rng, 2, experts).astype(float)
    owner_ME = np.stack([random_owners(rng, experts, ranks) for _ in range(2)])
    copies_MPC = sparse_materialization(loads_ME, owner_ME, ranks, per_node, copies, degree)
    for owner_E, loads_E, copies_PC in zip(owner_ME, loads_ME, copies_MPC, strict=True):
        placement = placement_of(owner_E, copies_PC)
        assert problems(placement, copies) == []
        hottest = set(np.argsort(-loads_E, kind="stable")[:degree].tolist())
        assert set(copies_PC[copies_PC >= 0].tolist()) <= hottest


def test_what_memory_allows_everywhere_is_everywhere():
    loads_ME = np.array([[1.0, 9.0, 8.0, 2.0]])
    copies_MPC = sparse_materialization(loads_ME, even_owners(4, 4)[None], 4, 2, 3, 2)
    placement = placement_of(even_owners(4, 4), copies_MPC[0])
    assert [placement.copies(rank) for rank in range(4)] == [[1, 2], [2], [1], [1, 2]]


def test_replicas_are_in_proportion_and_spread_over_nodes_first():
    """One copy per rank for two of eight experts with loads of 3 and 1, on four nodes of two: six and two of eight places;
    the first takes nodes in turn before a second rank of any, its owner's node last."""
    loads_ME = np.array([[3.0, 1.0, 0, 0, 0, 0, 0, 0]])
    (copies_PC,) = sparse_materialization(loads_ME, even_owners(8, 8)[None], 8, 2, 1, 2)
    first = np.flatnonzero(copies_PC[:, 0] == 0)
    assert len(first) == 6
    assert set((first // 2).tolist()) == {0, 1, 2, 3}
    assert (copies_PC[:, 0] == 1).sum() == 2


def test_the_hottest_of_each_layer_everywhere():
    loads_ME = np.array([[5.0, 1.0], [1.0, 5.0]])
    copies_MPC = hottest_everywhere(
        loads_ME, np.zeros((2, 2), dtype=np.int64), 2, np.array([1, 0]), 1
    )
    assert copies_MPC.tolist() == [[[-1], [0]], [[-1], [-1]]]
