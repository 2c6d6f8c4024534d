"""A layer whose hottest experts lie on several ranks, against the same layer on one: results and all gradients.

Shapes: T tokens, D model, F hidden, E experts, O own experts of a rank.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.moe.dispatch import LocalDispatcher
from moesys.moe.experts import Experts
from moesys.moe.held_experts import HeldExperts
from moesys.moe.layer_placement import LayerPlacement
from moesys.moe.placed import PlacedDispatcher
from moesys.parallel.exchange import FlatExchange
from moesys.parallel.sparse import SparseCollectives
from moesys.plan.chunk_routes import ROUTE_KINDS, RouteKind, chunk_route
from moesys.plan.placement import Placement, owners_alone
from moesys.testing.ranks import run_ranks
from tests.plan.placements import random_copies, random_owners

TOKENS, D, HIDDEN, EXPERTS, TOP_K, MICRO_STEPS, STEPS = 11, 6, 4, 5, 2, 2, 3


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up": (EXPERTS, 2, HIDDEN, D), "down": (EXPERTS, D, HIDDEN)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def batch(rank: int, step: int, micro_step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_TD, ids_TK, weights_TK and dy_TD; expert 0 is in every token."""
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + micro_step)
    x_TD, dy_TD = torch.randn(2, TOKENS, D, generator=generator, dtype=torch.float64)
    second = torch.randint(1, EXPERTS, (TOKENS, 1), generator=generator)
    ids_TK = torch.cat([torch.zeros_like(second), second], dim=1)
    weights_TK = torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float64)
    return x_TD, ids_TK, weights_TK, dy_TD


def placements(size: int, calibrates: bool) -> list[Placement]:
    """Of each step, all with one owner table; of one that more copies come to, without any."""
    owner_E = random_owners(np.random.default_rng(3), EXPERTS, size)
    found = [random_copies(np.random.default_rng(step), owner_E, size, 2) for step in range(STEPS)]
    return [found[0], owners_alone(owner_E, size), *found[2:]] if calibrates else found


def more_copies(placement: Placement, step: int) -> Placement:
    """Of experts that their ranks do not hold yet: at most one each, in the last step none."""
    rng, size = np.random.default_rng(10 + step), placement.num_ranks
    copies_PC = np.full((size, 1), -1)
    for rank in range(size if step < STEPS - 1 else 0):
        others = np.setdiff1d(np.arange(EXPERTS), placement.held(rank))
        if len(others) and rng.random() < 0.8:
            copies_PC[rank, 0] = rng.choice(others)
    return Placement(owner_E=placement.owner_E, copies_PC=copies_PC)


def passed(dispatcher, experts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    plan = dispatcher.plan(ids_TK)
    rows_RD, counts_L = dispatcher.dispatch(x_TD, plan)
    return dispatcher.combine(experts(rows_RD, counts_L, *plan.expert_arguments), weights_TK, plan)


def trained(dispatcher, experts, rank: int, step: int) -> dict[str, Tensor]:
    """y and dx of a rank's micro-steps, one after the other; gradients of experts add up."""
    ys, dxs = [], []
    for micro_step in range(MICRO_STEPS):
        x_TD, ids_TK, weights_TK, dy_TD = batch(rank, step, micro_step)
        x_TD.requires_grad_()
        y_TD = passed(dispatcher, experts, x_TD, ids_TK, weights_TK)
        y_TD.backward(dy_TD)
        ys.append(y_TD.detach())
        dxs.append(x_TD.grad)
    return {"y": torch.cat(ys), "dx": torch.cat(dxs)}


def _over_ranks(
    rank: int, size: int, kind: RouteKind, releases: bool, calibrates: bool
) -> tuple[list[dict[str, Tensor]], list[int]]:
    """And the bytes that this rank sent for copies in each step."""
    placed = placements(size, calibrates)
    own = placed[0].own(rank)
    parameters = {name: torch.nn.Parameter(whole[own].clone()) for name, whole in weights().items()}
    experts = HeldExperts(**parameters, owned=own)
    experts.backend = "loop"
    collectives = SparseCollectives(dist.new_group(range(size)), per_node=2)
    layer = LayerPlacement(experts, placed[0].owner_E, collectives, releases)
    dispatcher = PlacedDispatcher(EXPERTS, FlatExchange(dist.group.WORLD), None, 2, layer.decide)
    found, sent_bytes = [], []
    for step, placement in enumerate(placed):
        layer.take(placement, chunk_route(placement, 2, kind), MICRO_STEPS)
        if calibrates:
            more = more_copies(placement, step)
            found_more = (more, chunk_route(more, 2, kind)) if step < STEPS - 1 else None
            layer.calibrate_after_routing(lambda *_, found_more=found_more: found_more)
        layer.begin()
        rows = trained(dispatcher, experts, rank, step)
        layer.begin_ahead()  # as where the block before is recomputed: nothing sets out once more
        layer.finish()
        grads = {name: getattr(experts, name).grad for name in weights()}
        found.append({**rows, **grads})
        sent_bytes.append(collectives.meter.read().sent_bytes)
        experts.zero_grad(set_to_none=True)
    return found, sent_bytes


@pytest.mark.parametrize("kind", ROUTE_KINDS)
@pytest.mark.parametrize(("size", "releases"), [(1, False), (2, False), (4, False), (4, True)])
@pytest.mark.parametrize("calibrates", [False, True], ids=["", "calibrated"])
def test_copies_change_no_number(
    size: int, kind: RouteKind, releases: bool, calibrates: bool
) -> None:
    """And travel once a step and way, or for each forward and each backward where they are released."""
    ranks = run_ranks(_over_ranks, size, kind, releases, calibrates)
    results, sent_bytes = zip(*ranks, strict=True)
    chunk_bytes, planned = 8 * 3 * HIDDEN * D, placements(size, calibrates)
    for rank, of_rank in enumerate(sent_bytes):
        for step, (placement, sent) in enumerate(zip(planned, of_rank, strict=True)):
            sets = [placement, *([more_copies(placement, step)] if calibrates else [])]
            gathers = MICRO_STEPS * 2 if releases else 1
            reduces = MICRO_STEPS if releases else 1
            chunks = 0
            for route in (chunk_route(copies, 2, kind) for copies in sets):
                chunks += gathers * route.sent_chunks(rank) + reduces * len(route.arrivals(rank))
            assert sent == chunks * chunk_bytes
    experts = Experts(EXPERTS, D, HIDDEN).double()
    experts.backend = "loop"
    for name, whole in weights().items():
        experts.register_parameter(name, torch.nn.Parameter(whole))
    dispatcher = LocalDispatcher(EXPERTS)
    owner_E = planned[0].owner_E
    for step in range(STEPS):
        experts.zero_grad(set_to_none=True)
        for rank in range(size):
            for name, rows in trained(dispatcher, experts, rank, step).items():
                torch.testing.assert_close(results[rank][step][name], rows)
        for name, parameter in experts.named_parameters():
            for rank in range(size):
                own = np.flatnonzero(owner_E == rank)
                torch.testing.assert_close(results[rank][step][name], parameter.grad[own])
