"""Dispatch to experts with several holders: the identity, and every row at one who holds its expert.

Shapes: T tokens, D model, E experts, K experts per token.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from moesys.moe.placed import Levels, PlacedDispatcher
from moesys.parallel.exchange import FlatExchange
from moesys.plan.placement import Amounts, Placement
from moesys.plan.shares import Shares
from moesys.testing.ranks import run_ranks
from tests.moe.test_dispatch import CASES, D, assert_identity, make_routing, passed
from tests.parallel.test_exchange import make_exchange
from tests.plan.placements import random_placement

COPIES = 3
each_way = pytest.mark.parametrize(("size", "per_node"), [(1, None), (2, None), (4, None), (4, 2)])


def placement_for(num_experts: int, size: int, case: str) -> Placement:
    return random_placement(np.random.default_rng(len(case)), num_experts, size, COPIES)


def _there_and_back(
    rank: int, size: int, per_node: int | None, case: str, speeds_P: Amounts | None = None
):
    x_TD, routing, num_experts = make_routing(rank, case)
    x_TD.requires_grad_()
    placement = placement_for(num_experts, size, case)
    seen = []
    held, own = len(placement.held(rank)), len(placement.own(rank))
    first = (held - own) // 2
    copies = SimpleNamespace(placement=placement, held=[own, first, held - own - first])
    dispatcher = PlacedDispatcher(
        num_experts,
        FlatExchange(dist.group.WORLD) if per_node is None else make_exchange(size, per_node),
        None,
        per_node or size,
        lambda counts_PE: seen.append(counts_PE) or copies,
    )
    dispatcher.speeds_P = speeds_P
    plan, found = passed(dispatcher, x_TD, routing, rank)
    assert plan.expert_arguments == (plan.rows_per_class_list, copies)
    return found | {"known": seen, "levels": dispatcher.levels}


@each_way
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by_speed", [False, True], ids=["even", "by speed"])
def test_there_and_back_is_the_identity(
    case: str, size: int, per_node: int | None, by_speed: bool
) -> None:
    speeds_P = 0.5 + np.arange(size) / 2 if by_speed else None
    results = run_ranks(_there_and_back, size, per_node, case, speeds_P)
    num_experts = CASES[case][1]
    placement = placement_for(num_experts, size, case)
    counts_PE = np.stack([result["slots"].numpy() for result in results])
    shares = Shares.of(counts_PE, placement, per_node or size, speeds_P)
    arrived: list[list[list[float]]] = [[] for _ in range(num_experts)]
    for rank, result in enumerate(results):
        assert_identity(result)
        (known,) = result["known"]
        assert known.tolist() == counts_PE.tolist(), "all ranks know all counts"
        held = placement.held(rank)
        counts = result["counts"].tolist()
        assert len(counts) == len(held)
        own = len(placement.own(rank))
        middle = own + (len(held) - own) // 2
        sets = counts[:own], counts[own:middle], counts[middle:]
        assert result["classes"] == [*map(sum, sets)]
        assert sum(counts) == len(result["rows"]) == shares.loads_P()[rank]
        for expert, rows_RD in zip(held, result["rows"].split(counts), strict=True):
            arrived[expert] += rows_RD.tolist()
    for expert in range(num_experts):
        sent = [
            result["x"][t].tolist()
            for result in results
            for t, ids in enumerate(result["ids"].tolist())
            if expert in ids
        ]
        assert sorted(arrived[expert]) == sorted(sent)
    assert all(len(row) == D for rows in arrived for row in rows)


def test_levels_are_over_speeds() -> None:
    """Rank 1, half as fast, is level with a third of the rows: its owner alone would take all of them."""
    placement = Placement(owner_E=np.array([1]), copies_PC=np.array([[0], [-1]]))
    levels = Levels()
    speeds_P = np.array([1.0, 0.5])
    levels.add(placement, np.array([300]), np.array([200, 100]), speeds_P)
    assert (levels.busiest, levels.if_owners_alone, levels.mean) == (200.0, 600.0, 200.0)
    levels.add(placement, np.array([300]), np.array([200, 100]))
    assert (levels.busiest, levels.if_owners_alone, levels.mean) == (400.0, 900.0, 350.0)
