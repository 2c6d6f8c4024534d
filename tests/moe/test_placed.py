"""Dispatch to experts with several holders: the identity, and every row at one who holds its expert.

Shapes: T tokens, D model, E experts, K experts per token.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moesys.moe.placed import PlacedDispatcher
from moesys.parallel.exchange import FlatExchange
from moesys.plan.placement import Placement
from moesys.plan.shares import Shares
from moesys.testing.ranks import run_ranks
from tests.moe.test_dispatch import CASES, D, assert_identity, make_routing
from tests.parallel.test_exchange import make_exchange
from tests.plan.placements import random_placement

COPIES = 3
each_way = pytest.mark.parametrize(("size", "per_node"), [(1, None), (2, None), (4, None), (4, 2)])


def placement_for(num_experts: int, size: int, case: str) -> Placement:
    return random_placement(np.random.default_rng(len(case)), num_experts, size, COPIES)


def _there_and_back(rank: int, size: int, per_node: int | None, case: str):
    x_TD, routing, num_experts = make_routing(rank, case)
    x_TD.requires_grad_()
    placement = placement_for(num_experts, size, case)
    seen = []
    copies = SimpleNamespace(placement=placement)
    dispatcher = PlacedDispatcher(
        num_experts,
        FlatExchange(dist.group.WORLD) if per_node is None else make_exchange(size, per_node),
        None,
        per_node or size,
        lambda counts_PE: seen.append(counts_PE) or copies,
    )
    plan = dispatcher.plan(routing.topk_ids_TK)
    rows_RD, counts_L = dispatcher.dispatch(x_TD, plan)
    y_TD = dispatcher.combine(rows_RD, routing.topk_weights_TK, plan)
    gradient_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(rank))
    y_TD.backward(gradient_TD)
    assert plan.expert_arguments == (plan.rows_per_class_list, copies)
    return {
        "x": x_TD.detach(),
        "y": y_TD.detach(),
        "dx": x_TD.grad,
        "dy": gradient_TD,
        "rows": rows_RD.detach(),
        "counts": counts_L,
        "parts": plan.rows_per_class_list,
        "ids": routing.topk_ids_TK,
        "served": (routing.topk_ids_TK >= 0).any(1),
        "known": seen,
        "slots": plan.slots_per_expert_E,
    }


@each_way
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_identity(case: str, size: int, per_node: int | None) -> None:
    results = run_ranks(_there_and_back, size, per_node, case)
    num_experts = CASES[case][1]
    placement = placement_for(num_experts, size, case)
    counts_PE = np.stack([result["slots"].numpy() for result in results])
    shares = Shares.of(counts_PE, placement, per_node or size)
    arrived: list[list[list[float]]] = [[] for _ in range(num_experts)]
    for rank, result in enumerate(results):
        assert_identity(result)
        (known,) = result["known"]
        assert known.tolist() == counts_PE.tolist(), "all ranks know all counts"
        held = placement.held(rank)
        counts = result["counts"].tolist()
        assert len(counts) == len(held)
        own = len(placement.own(rank))
        assert result["parts"] == [sum(counts[:own]), sum(counts[own:])]
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
