"""Experts packed anew with replicas: as many owners on each rank, loads level."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.plan.placement import problems
from moesys.plan.repair import expected_loads
from moesys.plan.replication import replicated
from tests.plan.placements import random_loads, seeds


@settings(deadline=None, max_examples=300)
@given(seeds(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_every_rank_owns_as_many(rng, nodes, per_node, own, copies):
    ranks = nodes * per_node
    loads_E = random_loads(rng, own * ranks).astype(float)
    placement = replicated(loads_E, ranks, per_node, copies)
    assert problems(placement, copies) == []
    assert np.bincount(placement.owner_E, minlength=ranks).tolist() == [own] * ranks


@pytest.mark.parametrize(("copies", "most"), [(0, 1.6), (2, 1.1)])
def test_replicas_level_a_skewed_load(copies, most):
    """Of 64 experts on 8 ranks, by Zipf's law: packing alone cannot cut the hottest."""
    loads_E = np.random.default_rng(0).permutation(np.arange(1, 65) ** -0.8)
    loads_P = expected_loads(loads_E, replicated(loads_E, 8, 2, copies))[1]
    assert loads_P.max() / loads_P.mean() < most


def test_nodes_must_be_filled():
    with pytest.raises(ValueError, match="not spread evenly over 4 ranks of nodes of 3"):
        replicated(np.ones(8), 4, 3, 1)
