"""Copies in case loads come otherwise: within the budget, of experts that a rank has not, and worth what they are for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moesys.config.placement_schema import PlacementConfig
from moesys.plan.expert_copies import planned_placements
from moesys.plan.placement import even_owners, problems
from moesys.plan.repair import expected_loads
from moesys.plan.spare_copies import with_spare
from tests.plan.placements import random_copies, random_loads, random_owners, seeds


@given(seeds(), st.integers(1, 10), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_every_rank_holds_as_many_as_there_are(rng, experts, nodes, per_node, least):
    """And nothing that was planned goes."""
    ranks = nodes * per_node
    owner_E, loads_E = random_owners(rng, experts, ranks), random_loads(rng, experts).astype(float)
    planned = random_copies(rng, owner_E, ranks, 3)
    spare = with_spare(loads_E, planned, per_node, least)
    assert problems(spare, 3) == []
    for rank in range(ranks):
        before, after = set(planned.copies(rank)), set(spare.copies(rank))
        assert before <= after
        others = experts - len(planned.own(rank))
        assert len(after) == max(len(before), min(least, others))


def test_loads_that_come_otherwise_are_more_level() -> None:
    """A plan for other loads, from the same law: mean over 50 of the busiest rank's rows over the mean."""
    rng, owner_E = np.random.default_rng(3), even_owners(16, 8)
    levels: dict[int, list[float]] = {0: [], 2: []}
    for _ in range(50):
        predicted_E, true_E = (1e4 * rng.dirichlet(np.full(16, 4.0)) for _ in range(2))
        for spare, found in levels.items():
            config = PlacementConfig(policy="balanced", spare=spare)
            (placement,) = planned_placements(config, [predicted_E], [owner_E], 8, 2)
            loads_P = expected_loads(true_E, placement)[1]
            found.append(float(loads_P.max() / loads_P.mean()))
    assert np.mean(levels[2]) - 1 < 0.5 * (np.mean(levels[0]) - 1)


def test_a_layer_without_copies_gets_none_to_spare() -> None:
    config = PlacementConfig(policy="balanced", spare=2)
    (placement,) = planned_placements(config, [np.full(16, 100.0)], [even_owners(16, 8)], 8, 2)
    assert (placement.copies_PC < 0).all()
