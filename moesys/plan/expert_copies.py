"""Which ranks hold copies of which experts in the next step, by the policy of a configuration. Pure.

Shapes: M MoE layers, E experts, P ranks (`per_node` of each node one after another).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesys.config.placement_schema import PlacementConfig
from moesys.plan.copies import balancing_copies
from moesys.plan.crossing import crossing_rows
from moesys.plan.level_owners import level_owners
from moesys.plan.placement import Amounts, Integers, Placement
from moesys.plan.repair import GOOD, expected_loads, repairs
from moesys.plan.replication import replicated
from moesys.plan.sharding import heterogeneous_sharding
from moesys.plan.spare_copies import with_spare
from moesys.plan.sparse_materialization import hottest_everywhere, sparse_materialization

MOST_RANKS = 64
"""Groups of at most so many choose the experts that are near, and change each layer's copies one by one once more: on 64 ranks
with 256 experts both take 8 ms a layer."""
REPAIR_STEPS = 16
NEAR_TIMES = (4, 2, 1)
"""Experts of which a node has so many times the rows that a copy and its gradient weigh may come near, all or none of them."""
COST_SWEEPS = 4
"""Of levelling, to compare plans: all of them take three times as long, and choose alike."""
WORTH = 0.02
"""Of a step (`_cost`), that other owners must save: experts move with all of their optimizer states."""


def planned_placements(
    config: PlacementConfig,
    loads_M: Sequence[Amounts],
    owners_M: Sequence[Integers],
    num_ranks: int,
    per_node: int,
    rows_per_copy: float = math.inf,
    speeds_P: Amounts | None = None,
) -> list[Placement]:
    """Of each layer, from its experts' loads [E] and owners [E]; layers may have different numbers of experts. Owners stay but
    with `policy=eplb`.

    Args:
        rows_per_copy: of a step's rows over all ranks, that are as many bytes as a copy of their expert and its gradient: a copy
            on another node must take as many off the owner's. Infinite = not known, copies count as nothing.
        speeds_P: of `balanced`, whose ranks' means are by them; None = all alike.
    """
    if config.policy == "eplb":
        return [replicated(loads_E, num_ranks, per_node, config.most_copies) for loads_E in loads_M]
    ranks = num_ranks, per_node, rows_per_copy, speeds_P
    placements: dict[int, Placement] = {}
    for number in {len(loads_E) for loads_E in loads_M}:
        layers = [layer for layer, loads_E in enumerate(loads_M) if len(loads_E) == number]
        loads_ME = np.stack([loads_M[layer] for layer in layers])
        owner_ME = np.stack([owners_M[layer] for layer in layers])
        copies_MPC = _copies(config, loads_ME, owner_ME, *ranks)
        for layer, loads_E, owner_E, copies_PC in zip(
            layers, loads_ME, owner_ME, copies_MPC, strict=True
        ):
            placement = Placement(owner_E=owner_E, copies_PC=copies_PC)
            if config.policy == "balanced" and num_ranks <= MOST_RANKS:
                good, far = max(GOOD, 1 + config.tolerance), _far_load(rows_per_copy)
                limits = config.most_copies, REPAIR_STEPS, good, per_node, far, speeds_P
                *_, placement = repairs(loads_E, placement, *limits)
                if (placement.copies_PC >= 0).any():
                    placement = with_spare(loads_E, placement, per_node, config.spare)
            placements[layer] = placement
    return [placements[layer] for layer in range(len(loads_M))]


def better_owners(
    config: PlacementConfig,
    loads_M: Sequence[Amounts],
    owners_M: Sequence[Integers],
    num_ranks: int,
    per_node: int,
    rows_per_copy: float = math.inf,
    speeds_P: Amounts | None = None,
) -> list[Integers] | None:
    """Other owners (Hecate's, plan/sharding.py, or of `balanced` those of plan/level_owners.py) with which, and the copies that
    would be planned, steps took less time; None if not by `WORTH`."""
    budget = num_ranks, per_node, rows_per_copy

    def cost(owners_M: Sequence[Integers]) -> float:
        placements = planned_placements(config, loads_M, owners_M, *budget, speeds_P)
        return sum(
            _cost(loads_E, placement, per_node, rows_per_copy, speeds_P)
            for loads_E, placement in zip(loads_M, placements, strict=True)
        )

    if config.policy == "balanced":
        choices = [
            level_owners(loads_M, num_ranks, per_node, near_M)
            for near_M in _near_choices(loads_M, *budget)
        ]
    else:
        assert config.overlap_degree is not None, "a measured one is filled in"
        choices = [heterogeneous_sharding(loads_M, num_ranks, per_node, config.overlap_degree)]
    costs = [cost(others_M) for others_M in choices]
    best = int(np.argmin(costs))
    return choices[best] if costs[best] < (1 - WORTH) * cost(owners_M) else None


def _copies(
    config: PlacementConfig,
    loads_ME: Amounts,
    owner_ME: Integers,
    num_ranks: int,
    per_node: int,
    rows_per_copy: float,
    speeds_P: Amounts | None,
) -> Integers:
    """int64 [M, P, C], -1 = none."""
    if config.policy == "balanced":
        ranks = num_ranks, per_node, rows_per_copy, speeds_P
        return _balanced(config, loads_ME, owner_ME, *ranks)
    if config.policy == "everywhere":
        hottest_M = np.full(len(loads_ME), config.most_copies)
        return hottest_everywhere(loads_ME, owner_ME, num_ranks, hottest_M, config.most_copies)
    assert config.policy == "hecate", config.policy
    assert config.overlap_degree is not None, "a measured one is filled in"
    return sparse_materialization(
        loads_ME, owner_ME, num_ranks, per_node, config.most_copies, config.overlap_degree
    )


def _balanced(
    config: PlacementConfig,
    loads_ME: Amounts,
    owner_ME: Integers,
    num_ranks: int,
    per_node: int,
    rows_per_copy: float,
    speeds_P: Amounts | None,
) -> Integers:
    """With the experts near with which a step costs least."""
    limits = config.tolerance, _far_load(rows_per_copy), speeds_P

    def planned(near_ME: NDArray[np.bool_]) -> Integers:
        budget = num_ranks, per_node, config.most_copies
        return balancing_copies(loads_ME, owner_ME, *budget, near_ME, *limits)

    def cost(layer: int, copies_PC: Integers) -> float:
        placement = Placement(owner_E=owner_ME[layer], copies_PC=copies_PC)
        return _cost(loads_ME[layer], placement, per_node, rows_per_copy, speeds_P)

    none_M, *others = _near_choices([*loads_ME], num_ranks, per_node, rows_per_copy)
    found_MPC, least = planned(np.stack(none_M)), dict[int, float]()
    for near_ME in map(np.stack, others):
        other_MPC = planned(near_ME)
        for layer in np.flatnonzero(near_ME.any(1)).tolist():
            if layer not in least:
                least[layer] = cost(layer, found_MPC[layer])
            other = cost(layer, other_MPC[layer])
            if other < least[layer]:
                found_MPC[layer], least[layer] = other_MPC[layer], other
    return found_MPC


def _near_choices(
    loads_M: Sequence[Amounts], num_ranks: int, per_node: int, rows_per_copy: float
) -> list[list[NDArray[np.bool_]]]:
    """[M][E]: which experts all nodes may have; first none, and each other than the one before."""
    choices = [[np.zeros(len(loads_E), dtype=np.bool_) for loads_E in loads_M]]
    if math.isfinite(rows_per_copy) and per_node < num_ranks <= MOST_RANKS:
        for times in NEAR_TIMES:
            rows = times * rows_per_copy * num_ranks / per_node
            near_M = [loads_E > rows for loads_E in loads_M]
            if any((a != b).any() for a, b in zip(near_M, choices[-1], strict=True)):
                choices.append(near_M)
    return choices


def _cost(
    loads_E: Amounts,
    placement: Placement,
    per_node: int,
    rows_per_copy: float,
    speeds_P: Amounts | None,
) -> float:
    """What a step's time goes with, as far as anybody knows who knows no rates: the busiest rank's load, and what crosses the
    busiest uplink, the geometric mean of both."""
    amounts_H, loads_P = expected_loads(loads_E, placement, COST_SWEEPS, speeds_P)
    busiest = float(loads_P.max())
    if not math.isfinite(rows_per_copy) or per_node >= placement.num_ranks:
        return busiest
    crossing = crossing_rows(loads_E, placement, amounts_H, per_node, rows_per_copy)
    return math.sqrt(busiest * crossing)


def _far_load(rows_per_copy: float) -> float:
    """That a copy on another node must have."""
    return rows_per_copy if math.isfinite(rows_per_copy) else 0.0
