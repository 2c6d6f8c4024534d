"""Which ranks hold copies of which experts in the next step, by the policy of a configuration. Pure.

Shapes: M MoE layers, E experts, P ranks (`per_node` of each node one after another).
"""

from collections.abc import Sequence

import numpy as np

from moesys.config.placement_schema import PlacementConfig
from moesys.plan.copies import balancing_copies
from moesys.plan.placement import Amounts, Integers, Placement
from moesys.plan.repair import expected_loads, repaired
from moesys.plan.replication import replicated
from moesys.plan.sharding import heterogeneous_sharding
from moesys.plan.sparse_materialization import hottest_everywhere, sparse_materialization

REPAIRED_RANKS = 64
"""Of at most so many, each layer's copies are changed one by one once more: it takes a millisecond a layer, and more of more."""
REPAIR_STEPS = 16
WORTH = 0.02
"""Of the busiest ranks' rows, that other owners must save: experts move with all of their optimizer states."""


def planned_placements(
    config: PlacementConfig,
    loads_M: Sequence[Amounts],
    owners_M: Sequence[Integers],
    num_ranks: int,
    per_node: int,
) -> list[Placement]:
    """Of each layer, from its experts' loads [E] and owners [E]; layers may have different numbers of experts. Owners stay but
    with `policy=eplb`."""
    if config.policy == "eplb":
        return [replicated(loads_E, num_ranks, per_node, config.copies) for loads_E in loads_M]
    placements: dict[int, Placement] = {}
    for number in {len(loads_E) for loads_E in loads_M}:
        layers = [layer for layer, loads_E in enumerate(loads_M) if len(loads_E) == number]
        loads_ME = np.stack([loads_M[layer] for layer in layers])
        owner_ME = np.stack([owners_M[layer] for layer in layers])
        copies_MPC = _copies(config, loads_ME, owner_ME, num_ranks, per_node)
        for layer, loads_E, owner_E, copies_PC in zip(
            layers, loads_ME, owner_ME, copies_MPC, strict=True
        ):
            placement = Placement(owner_E=owner_E, copies_PC=copies_PC)
            if config.policy == "balanced" and num_ranks <= REPAIRED_RANKS:
                placement = repaired(loads_E, placement, config.copies, REPAIR_STEPS)
            placements[layer] = placement
    return [placements[layer] for layer in range(len(loads_M))]


def better_owners(
    config: PlacementConfig,
    loads_M: Sequence[Amounts],
    owners_M: Sequence[Integers],
    num_ranks: int,
    per_node: int,
) -> list[Integers] | None:
    """Other owners (plan/sharding.py) if with these, and the copies that would be planned, the busiest ranks of all layers had
    less to do; None if not by `WORTH`."""
    others_M = heterogeneous_sharding(loads_M, num_ranks, per_node, config.overlap_degree)

    def busiest(owners_M: Sequence[Integers]) -> float:
        placements = planned_placements(config, loads_M, owners_M, num_ranks, per_node)
        return sum(
            float(expected_loads(loads_E, placement)[1].max())
            for loads_E, placement in zip(loads_M, placements, strict=True)
        )

    return others_M if busiest(others_M) < (1 - WORTH) * busiest(owners_M) else None


def _copies(
    config: PlacementConfig, loads_ME: Amounts, owner_ME: Integers, num_ranks: int, per_node: int
) -> Integers:
    """int64 [M, P, C], -1 = none."""
    if config.policy == "balanced":
        return balancing_copies(loads_ME, owner_ME, num_ranks, per_node, config.copies)
    if config.policy == "everywhere":
        hottest_M = np.full(len(loads_ME), config.copies)
        return hottest_everywhere(loads_ME, owner_ME, num_ranks, hottest_M, config.copies)
    assert config.policy == "hecate", config.policy
    return sparse_materialization(
        loads_ME, owner_ME, num_ranks, per_node, config.copies, config.overlap_degree
    )
