"""A token that goes to a node once: the numbers of the flat exchange, and bytes that follow from the routing alone.

Shapes: T tokens, D model, E experts, K experts per token.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.moe.compression import PLAIN, WireFormats
from moesys.moe.deduplicated import DeduplicatingDispatcher
from moesys.moe.dispatch import Dispatcher, ExpertParallelDispatcher
from moesys.ops.wire import WireFormat
from moesys.parallel.dims import nodes_and_rails
from moesys.parallel.exchange import FlatExchange, RowFormats
from moesys.parallel.hierarchical import HierarchicalExchange
from moesys.plan.placement import expert_places
from moesys.testing.ranks import run_ranks
from tests.moe.test_dispatch import CASES, D, make_routing

SIZES = [(4, 2), (4, 1), (4, 4), (2, 1)]
"""Ranks, and how many are on a node."""
NUMBERS = [(case, 4, 2) for case in CASES] + [("random", *size) for size in SIZES[1:]]


def own_group(groups: list[list[int]]) -> dist.ProcessGroup:
    made = [dist.new_group(ranks) for ranks in groups]
    (own,) = [g for g, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks]
    return own


def make_dispatcher(kind: str, num_experts: int, per_node: int, num_classes: int) -> Dispatcher:
    if kind == "flat":
        world = FlatExchange(dist.group.WORLD, per_node)
        return ExpertParallelDispatcher(num_experts, world, None, num_classes)
    nodes, rails = nodes_and_rails(range(dist.get_world_size()), per_node)
    if kind == "hierarchical":
        groups = (own_group(nodes), own_group(rails))
        by_node = HierarchicalExchange(dist.group.WORLD, *groups, per_node)
        return ExpertParallelDispatcher(num_experts, by_node, None, num_classes)
    node, rail = (FlatExchange(own_group(groups), per_node) for groups in (nodes, rails))
    return DeduplicatingDispatcher(num_experts, rail, node, None, num_classes)


def through_experts(rank: int, size: int, rows_RD: Tensor, counts_L: Tensor, places: list[int]):
    """Another factor for each expert."""
    num_local = len(places) // size
    own = sorted(
        (place, expert) for expert, place in enumerate(places) if place // num_local == rank
    )
    factors_L = torch.tensor([1.0 + expert for _, expert in own])
    return rows_RD * factors_L.repeat_interleave(counts_L)[:, None].to(rows_RD)


def _layer(
    rank: int,
    size: int,
    kind: str,
    case: str,
    per_node: int,
    num_classes: int = 1,
    formats: WireFormats = PLAIN,
) -> dict[str, Any]:
    x_TD, routing, num_experts = make_routing(rank, case)
    weights_TK = routing.topk_weights_TK.clone().requires_grad_()
    x_TD.requires_grad_()
    dispatcher = make_dispatcher(kind, num_experts, per_node, num_classes)
    plan = dispatcher.plan(routing.topk_ids_TK, formats=formats)
    rows_RD, counts_L = dispatcher.dispatch(x_TD, plan)
    places = expert_places(num_experts, num_classes, size)
    out_RD = through_experts(rank, size, rows_RD, counts_L, places)
    y_TD = dispatcher.combine(out_RD, weights_TK, plan)
    y_TD.backward(torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(rank)))
    traffic = [exchange.meter.read() for exchange in dispatcher.exchanges()]
    return {
        "y": y_TD.detach(),
        "dx": x_TD.grad,
        "dw": weights_TK.grad,
        "counts": counts_L,
        "slots": plan.slots_per_expert_E,
        "classes": plan.expert_arguments,
        "ids": routing.topk_ids_TK,
        "between": sum(t.between_nodes_bytes for t in traffic),
        "experts": num_experts,
    }


@pytest.mark.parametrize(("case", "size", "per_node"), NUMBERS)
def test_the_numbers_are_those_of_the_flat_exchange(case: str, size: int, per_node: int) -> None:
    flat = run_ranks(_layer, size, "flat", case, per_node)
    found = run_ranks(_layer, size, "deduplicated", case, per_node)
    for ours, theirs in zip(found, flat, strict=True):
        for name in ("y", "dx", "dw"):
            torch.testing.assert_close(ours[name], theirs[name])
        for name in ("counts", "slots"):
            assert torch.equal(ours[name], theirs[name])


def sent_between_nodes(results: list[dict[str, Any]], rank: int, per_node: int) -> int:
    """Bytes, from the routing alone: rows of fp32 and int16 ids there, and back what they make; weights and gradients."""
    size, top_k = len(results), results[0]["ids"].shape[1]
    num_nodes = size // per_node
    per_expert = results[0]["experts"] // num_nodes

    def rows(source: int, node: int) -> int:
        return sum(
            any(expert >= 0 and expert // per_expert == node for expert in ids)
            for ids in results[source]["ids"].tolist()
        )

    own, place = divmod(rank, per_node)
    leave = sum(rows(rank, node) for node in range(num_nodes) if node != own)
    come = sum(rows(node * per_node + place, own) for node in range(num_nodes) if node != own)
    row, ids, weights = D * 4, 2 * top_k, 4 * top_k
    return leave * (row + ids + weights + row) + come * (row + row + weights)


@pytest.mark.parametrize(("size", "per_node"), SIZES)
@pytest.mark.parametrize("case", ["random", "slots without an expert", "every expert"])
def test_bytes_between_nodes_follow_from_the_routing(case: str, size: int, per_node: int) -> None:
    found = run_ranks(_layer, size, "deduplicated", case, per_node)
    for rank, result in enumerate(found):
        assert result["between"] == sent_between_nodes(found, rank, per_node)
    flat = run_ranks(_layer, size, "flat", case, per_node)
    if case == "every expert" and size == 4 and per_node == 2:  # 4 experts on 2 nodes
        rows, extra = 5 * D * 4, 5 * 4 * (2 + 4 + 4)
        assert [r["between"] for r in flat] == [4 * 2 * rows] * 4
        assert [r["between"] for r in found] == [4 * rows + extra] * 4


@pytest.mark.parametrize("case", ["random", "slots without an expert"])
def test_experts_of_several_widths_lie_where_the_flat_exchange_has_them(case: str) -> None:
    flat = run_ranks(_layer, 4, "flat", case, 2, 2)
    found = run_ranks(_layer, 4, "deduplicated", case, 2, 2)
    for ours, theirs in zip(found, flat, strict=True):
        assert torch.equal(ours["counts"], theirs["counts"])
        assert ours["classes"] == theirs["classes"]
        for name in ("y", "dx", "dw"):
            torch.testing.assert_close(ours[name], theirs[name])


def test_rows_are_written_in_eight_bits_between_nodes() -> None:
    int8 = RowFormats(forward=WireFormat(kind="int8"), backward=WireFormat(kind="int8"))
    plain = run_ranks(_layer, 4, "deduplicated", "random", 2)
    found = run_ranks(
        _layer, 4, "deduplicated", "random", 2, 1, WireFormats(dispatch=int8, combine=int8)
    )
    for ours, theirs in zip(found, plain, strict=True):
        assert not torch.equal(ours["y"], theirs["y"])
        for name in ("y", "dx"):
            scale = theirs[name].abs().max().item()
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0.05 * scale)
        assert ours["between"] < theirs["between"]


def test_padded_rows_are_refused() -> None:
    (said,) = set(run_ranks(_padded, 2))
    assert "use capacity_policy=drop" in said


def _padded(rank: int, size: int) -> str:
    dispatcher = make_dispatcher("deduplicated", 4, 1, 1)
    with pytest.raises(ValueError, match="capacity_policy=pad") as error:
        dispatcher.plan(torch.zeros(2, 1, dtype=torch.int64), padded_rows=3)
    return str(error.value)
