"""Sparse collectives against what every rank can work out by itself: all chunks, and all gradients."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moesys.parallel.sparse import SparseCollectives, sparse_all_gather, sparse_reduce_scatter
from moesys.plan.chunk_routes import ROUTE_KINDS, chunk_route
from moesys.plan.placement import Placement
from moesys.testing.ranks import run_ranks
from tests.plan.placements import random_placement

CASES = 6
"""Placements for each number of ranks and kind of route."""


def placements(ranks: int):
    """Random ones with chunks of different sizes, some empty; without copies; all experts everywhere."""
    rng = np.random.default_rng(ranks)
    for case in range(CASES):
        experts = int(rng.integers(1, 7))
        sizes_E = rng.integers(0, 5, experts).tolist()
        yield random_placement(rng, experts, ranks, case), sizes_E
    owner_E = np.arange(3) % ranks
    yield Placement(owner_E=owner_E, copies_PC=np.full((ranks, 2), -1)), [2, 3, 1]
    everywhere = np.full((ranks, 3), -1)
    for rank in range(ranks):
        others = np.flatnonzero(owner_E != rank)
        everywhere[rank, : len(others)] = others
    yield Placement(owner_E=owner_E, copies_PC=everywhere), [2, 3, 1]


def values(seed: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-8, 9, (size,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check(rank: int, ranks: int, per_node: int, dtype: torch.dtype) -> None:
    collectives = SparseCollectives(dist.group.WORLD, per_node)
    like = torch.empty(0, dtype=dtype)
    for placement, sizes_E in placements(ranks):
        own_experts, copied = placement.own(rank), placement.copies(rank)
        # Small integers: sums are exact in any order and type.
        weights = {e: values(100 * rank + e, sizes_E[e], dtype) for e in (*own_experts, *copied)}
        for kind in ROUTE_KINDS:
            route = chunk_route(placement, per_node, kind)
            own = {e: values(e, sizes_E[e], dtype).requires_grad_() for e in own_experts}
            copies, zero = sparse_all_gather(own, sizes_E, route, collectives, like)
            assert sorted(copies) == sorted(copied)
            for expert, copy in copies.items():
                assert torch.equal(copy, values(expert, sizes_E[expert], dtype))
            _check_bytes(collectives, route, sizes_E, dtype)

            held = [*own.items(), *copies.items()]
            (zero + sum((chunk * weights[e]).float().sum() for e, chunk in held)).backward()
            for expert, chunk in own.items():
                holders = placement.pairs.rank_H[placement.pairs.of(expert)].tolist()
                grads = [values(100 * r + expert, sizes_E[expert], dtype) for r in holders]
                assert torch.equal(chunk.grad, torch.stack(grads).sum(0)), (kind, expert)
            _check_bytes(collectives, route, sizes_E, dtype, back=True)

            given = {e: w.clone().requires_grad_() for e, w in weights.items()}
            sums, zero = sparse_reduce_scatter(
                {e: given[e] for e in own_experts},
                {e: given[e] for e in copied},
                sizes_E,
                route,
                collectives,
                like,
            )
            assert list(sums) == own_experts
            assert all(torch.equal(total, own[e].grad) for e, total in sums.items())
            _check_stages(collectives, route, sizes_E, weights, sums, like)
            grads = {e: values(e, sizes_E[e], dtype) for e in own_experts}
            (zero + sum((sums[e] * grads[e]).float().sum() for e in sums)).backward()
            for expert, tensor in given.items():
                assert torch.equal(tensor.grad, values(expert, sizes_E[expert], dtype))
            collectives.meter.read()


def _check_stages(collectives, route, sizes_E, weights, sums, like) -> None:
    """Each advance sends what is of the next stage, and after the last all sums are whole."""
    collectives.meter.read()
    copies = {e: weights[e].clone() for e in route.arrivals(collectives.rank)}
    reduce = collectives.begin_reduce(copies, sizes_E, route, like)
    for stage in reversed(route.stages):
        mine = [hop.expert for hop in stage if hop.dest == collectives.rank]
        sent = collectives.meter.read().sent_bytes
        assert sent == sum(sizes_E[expert] for expert in mine) * like.element_size()
        reduce.advance()
    totals = {expert: weights[expert].clone() for expert in sums}
    for expert, part in reduce.wait():
        totals[expert] += part
    assert collectives.meter.read().sent_bytes == 0
    assert all(torch.equal(totals[expert], total) for expert, total in sums.items())


def _check_bytes(collectives, route, sizes_E, dtype, back: bool = False) -> None:
    """As planned, to the byte."""
    hops = [hop[1::-1] + hop[2:] if back else hop for stage in route.stages for hop in stage]
    mine = [(dest, expert) for source, dest, expert in hops if source == collectives.rank]
    node = collectives.rank // collectives.per_node
    far = [(dest, expert) for dest, expert in mine if dest // collectives.per_node != node]
    sent, _, away, _ = collectives.meter.read()
    assert sent == sum(sizes_E[expert] for _, expert in mine) * dtype.itemsize
    assert away == sum(sizes_E[expert] for _, expert in far) * dtype.itemsize


@pytest.mark.parametrize(
    "ranks",
    [n if n in (1, 2, 4, 8) else pytest.param(n, marks=pytest.mark.parity) for n in range(1, 9)],
)
def test_copies_and_sums_are_those_of_the_dense_reference(ranks: int) -> None:
    run_ranks(_check, ranks, 2, torch.float32)


@pytest.mark.parametrize(
    ("per_node", "dtype"), [(1, torch.bfloat16), (3, torch.float64), (8, torch.bfloat16)]
)
def test_nodes_of_any_size_and_numbers_of_any_type(per_node: int, dtype: torch.dtype) -> None:
    run_ranks(_check, 6, per_node, dtype)


def _check_rounded_once(rank: int, ranks: int) -> None:
    """In a stage that sends own chunks and passes on others'."""
    collectives = SparseCollectives(dist.group.WORLD, 2)
    for placement, sizes_E in placements(ranks):
        whole = [
            torch.randn(size, generator=torch.Generator().manual_seed(e))
            for e, size in enumerate(sizes_E)
        ]
        for kind in ROUTE_KINDS:
            route = chunk_route(placement, 2, kind)
            own = {expert: whole[expert] for expert in placement.own(rank)}
            gather = collectives.begin_gather(own, sizes_E, route, torch.empty(0).bfloat16())
            gather.wait()
            assert sorted(gather.copies) == sorted(placement.copies(rank))
            for expert, copy in gather.copies.items():
                assert torch.equal(copy, whole[expert].bfloat16())


def test_chunks_may_travel_in_a_narrower_type() -> None:
    run_ranks(_check_rounded_once, 6)
