"""Megatron-core's plans of hybrid context parallelism: ones of ours that can be executed, of power-of-two rings.

Shapes: S sequences.
"""

from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.plan.batch.fit import least_ranks
from moesys.plan.batch.plan import problems
from moesys.plan.batch.policies import batch_seconds, planned
from moesys.plan.batch.seconds import plan_seconds
from tests.plan.batch.test_planners import CAPACITY, COSTS, heavy_tailed, random_lengths
from tests.plan.placements import seeds

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

from benchmarks.peers.megatron_hybrid_cp import megatron_plan

pytestmark = pytest.mark.oracle


@given(seeds(), st.sampled_from([1, 2, 4, 8, 16]), st.booleans())
def test_its_plans_can_be_executed(rng: np.random.Generator, num_ranks: int, is_odd: bool) -> None:
    lengths_S = random_lengths(rng, num_ranks)
    found = megatron_plan(lengths_S, num_ranks, CAPACITY + is_odd)
    assert problems(found.plan, CAPACITY + is_odd) == []
    assert sum(found.rounds_per_group) == len(found.plan.micro_steps)
    for _, piece in found.plan.pieces():
        size = len(piece.ranks)
        assert size & (size - 1) == 0
        assert size >= least_ranks(int(lengths_S[piece.sequence]), CAPACITY + is_odd)
    # Barriers only add.
    assert found.seconds(COSTS) >= plan_seconds(found.plan, COSTS, meets=False) * (1 - 1e-9)


def test_ranks_are_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="a power of two ranks, not 6"):
        megatron_plan(np.array([3]), 6, CAPACITY)


def test_any_number_of_ranks_is_nearer_even_work() -> None:
    lengths_S = heavy_tailed(np.random.default_rng(0), 600, 16_384)
    theirs_s = megatron_plan(lengths_S, 64, 1024).seconds(COSTS)
    ours = planned("hdp", lengths_S, 64, 1024, COSTS, meets=False)
    assert batch_seconds(ours, COSTS, meets=False) < theirs_s
