"""Which ranks hold copies of which experts in the next step, by the policy of a configuration. Pure.

Shapes: M MoE layers, E experts, P ranks (`per_node` of each node one after another).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesys.config.dispatch_schema import Wire
from moesys.config.placement_schema import PlacementConfig
from moesys.config.schema import RunConfig
from moesys.plan.copies import balancing_copies
from moesys.plan.costs import expert_parameters
from moesys.plan.crossing import crossing_rows
from moesys.plan.placement import Amounts, Integers, Placement
from moesys.plan.repair import GOOD, expected_loads, repaired
from moesys.plan.replication import replicated
from moesys.plan.sharding import heterogeneous_sharding
from moesys.plan.spare_copies import with_spare
from moesys.plan.sparse_materialization import hottest_everywhere, sparse_materialization

FP32 = 4
REPAIRED_RANKS = 64
"""Of at most so many, each layer's copies are changed one by one once more: on 64 ranks with 256 experts it takes 10 ms a layer, and
lowers the busiest rank from 1.1 means to 1.03."""
REPAIR_STEPS = 16
NEAR_TIMES = (2, 4)
"""Experts of which a node has so many times the rows that a copy and its gradient weigh may come near, all or none of them,"""
NEAR_GAIN = 0.1
"""where that saves so large a part of what crosses the busiest uplink, times the busiest rank's load. Bytes are not all: copies leave
their owners' links at once, and rows leave all."""
WORTH = 0.02
"""Of the busiest ranks' rows, that other owners must save: experts move with all of their optimizer states."""


def planned_placements(
    config: PlacementConfig,
    loads_M: Sequence[Amounts],
    owners_M: Sequence[Integers],
    num_ranks: int,
    per_node: int,
    rows_per_copy: float = math.inf,
) -> list[Placement]:
    """Of each layer, from its experts' loads [E] and owners [E]; layers may have different numbers of experts. Owners stay but
    with `policy=eplb`.

    Args:
        rows_per_copy: of which a node must have more for an expert (a step's loads are over all ranks) to get a copy of it that
            no level loads ask for.
    """
    if config.policy == "eplb":
        return [replicated(loads_E, num_ranks, per_node, config.most_copies) for loads_E in loads_M]
    placements: dict[int, Placement] = {}
    for number in {len(loads_E) for loads_E in loads_M}:
        layers = [layer for layer, loads_E in enumerate(loads_M) if len(loads_E) == number]
        loads_ME = np.stack([loads_M[layer] for layer in layers])
        owner_ME = np.stack([owners_M[layer] for layer in layers])
        copies_MPC = _copies(config, loads_ME, owner_ME, num_ranks, per_node, rows_per_copy)
        for layer, loads_E, owner_E, copies_PC in zip(
            layers, loads_ME, owner_ME, copies_MPC, strict=True
        ):
            placement = Placement(owner_E=owner_E, copies_PC=copies_PC)
            if config.policy == "balanced" and num_ranks <= REPAIRED_RANKS:
                good = max(GOOD, 1 + config.tolerance)
                placement = repaired(loads_E, placement, config.most_copies, REPAIR_STEPS, good)
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
) -> list[Integers] | None:
    """Other owners (plan/sharding.py) if with these, and the copies that would be planned, the busiest ranks of all layers had
    less to do; None if not by `WORTH`."""
    assert config.overlap_degree is not None, "a measured one is filled in"
    others_M = heterogeneous_sharding(loads_M, num_ranks, per_node, config.overlap_degree)

    def busiest(owners_M: Sequence[Integers]) -> float:
        placements = planned_placements(
            config, loads_M, owners_M, num_ranks, per_node, rows_per_copy
        )
        return sum(
            float(expected_loads(loads_E, placement)[1].max())
            for loads_E, placement in zip(loads_M, placements, strict=True)
        )

    return others_M if busiest(others_M) < (1 - WORTH) * busiest(owners_M) else None


def copy_in_rows(config: RunConfig, micro_steps: int) -> float:
    """How many rows of a step, there and back in forward and backward, are as many bytes as a copy of their expert that stays
    for the step, and its gradient. Infinite where a codec leaves open how many rows travel."""
    if config.dispatch.codec is not None or config.dispatch.candidates or not config.placement.near:
        return math.inf
    model, wire = config.model, config.dispatch.wire
    width = config.train.compute_bytes
    forwards = config.train.exchanging_forwards

    def row_bytes(kind: Wire) -> int:
        return wire.row_bytes(kind, model.d_row, width)

    of_row_bytes = (
        forwards * (row_bytes(wire.dispatch_forward) + row_bytes(wire.combine_forward))
        + row_bytes(wire.combine_backward)
        + row_bytes(wire.dispatch_backward)
    )
    gathers, reduces = _travels(config, micro_steps)
    of_copy_bytes = expert_parameters(model) * (gathers * width + reduces * FP32)
    return of_copy_bytes / of_row_bytes


def chunk_bytes(config: RunConfig, micro_steps: int) -> float:
    """Of an expert on its way, on one rank of parallel.etp: the mean of a step's, parameters there and gradients back."""
    gathers, reduces = _travels(config, micro_steps)
    each = (gathers * config.train.compute_bytes + reduces * FP32) / (gathers + reduces)
    return each * expert_parameters(config.model) / config.parallel.etp


def _travels(config: RunConfig, micro_steps: int) -> tuple[int, int]:
    """Of a copy in a step: how often there, and its gradient home."""
    return (2 * micro_steps, micro_steps) if config.placement.release else (1, 1)


def _copies(
    config: PlacementConfig,
    loads_ME: Amounts,
    owner_ME: Integers,
    num_ranks: int,
    per_node: int,
    rows_per_copy: float,
) -> Integers:
    """int64 [M, P, C], -1 = none."""
    if config.policy == "balanced":
        return _balanced(config, loads_ME, owner_ME, num_ranks, per_node, rows_per_copy)
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
) -> Integers:
    """With the experts near that make the least of what crosses the busiest uplink, times the busiest rank's load."""

    def planned(near_ME: NDArray[np.bool_] | None) -> Integers:
        budget = num_ranks, per_node, config.most_copies
        return balancing_copies(loads_ME, owner_ME, *budget, near_ME, config.tolerance)

    found_MPC = planned(None)
    if not (math.isfinite(rows_per_copy) and per_node < num_ranks <= REPAIRED_RANKS):
        return found_MPC

    def cost(layer: int, copies_PC: Integers) -> float:
        loads_E, owner_E = loads_ME[layer], owner_ME[layer]
        crossing = crossing_rows(loads_E, owner_E, copies_PC, per_node, rows_per_copy)
        placement = Placement(owner_E=owner_E, copies_PC=copies_PC)
        return crossing * float(expected_loads(loads_E, placement)[1].max())

    rows_of_node_ME = loads_ME * (per_node / num_ranks)
    for times in NEAR_TIMES:
        near_ME = rows_of_node_ME > times * rows_per_copy
        other_MPC = planned(near_ME)
        for layer in np.flatnonzero(near_ME.any(1)).tolist():
            if cost(layer, other_MPC[layer]) < (1 - NEAR_GAIN) * cost(layer, found_MPC[layer]):
                found_MPC[layer] = other_MPC[layer]
    return found_MPC
