"""The all-to-all of rows: values, gradients, formats on the wire and the exact bytes it counts, by every way."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.ops import expert_order, permute
from moesys.ops.wire import WireFormat, pack, unpack
from moesys.parallel.dims import nodes_and_rails
from moesys.parallel.exchange import FlatExchange, Route, RowFormats
from moesys.parallel.hierarchical import HierarchicalExchange
from moesys.testing.ranks import run_ranks

WIDTH = 3
WAYS = [(1, None), (2, None), (4, None), (4, 2), (4, 1), (4, 4), (6, 2), (6, 3)]
"""Ranks, and how many are on a node in an exchange in two steps."""
each_way = pytest.mark.parametrize(("size", "per_node"), WAYS)


def make_exchange(size: int, per_node: int | None) -> FlatExchange:
    if per_node is None:
        return FlatExchange(dist.group.WORLD, ranks_per_node=2)
    nodes, rails = nodes_and_rails(range(size), per_node)
    mine = []
    for groups in (nodes, rails):
        made = [dist.new_group(ranks) for ranks in groups]
        (own,) = [g for g, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks]
        mine.append(own)
    return HierarchicalExchange(dist.group.WORLD, *mine, per_node)


def sent_splits(rank: int, size: int) -> list[int]:
    """Uneven, with zeros: rank r sends (r + 2p) % 3 rows to rank p."""
    return [(rank + 2 * peer) % 3 for peer in range(size)]


def received_splits(rank: int, size: int) -> list[int]:
    return [sent_splits(peer, size)[rank] for peer in range(size)]


def make_route(rank: int, size: int, exchange: FlatExchange) -> Route:
    send = sent_splits(rank, size)
    through = exchange.through(torch.tensor(send)).tolist()
    assert len(through) == exchange.num_through
    return Route(
        send_splits_list=send,
        recv_splits_list=received_splits(rank, size),
        through_list=through,
    )


def _exchange(rank: int, size: int, per_node: int | None, dtype: torch.dtype):
    exchange = make_exchange(size, per_node)
    route = make_route(rank, size, exchange)
    owner = torch.cat(
        [torch.full((n,), 100 * rank + p) for p, n in enumerate(route.send_splits_list)]
    )
    rows = owner[:, None].expand(-1, WIDTH).to(dtype).clone().requires_grad_()
    received = exchange.rows(rows, route)
    received.backward(received.detach() * 2)
    back = exchange.rows(received.detach(), route.back())
    return received.detach(), rows.grad, rows.detach(), back, exchange.meter.read()


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_arrive_by_source_rank_and_gradients_return(size, per_node, dtype):
    for rank, (received, grad, rows, back, _) in enumerate(
        run_ranks(_exchange, size, per_node, dtype)
    ):
        expected = [
            100 * peer + rank for peer in range(size) for _ in range(sent_splits(peer, size)[rank])
        ]
        assert received[:, 0].tolist() == torch.tensor(expected, dtype=dtype).tolist()
        assert torch.equal(grad, rows * 2)
        assert torch.equal(back, rows)


@each_way
def test_bytes_are_counted(size, per_node):
    """Forward, backward and once more back: those to other ranks, and of these those to other nodes."""
    row_bytes = WIDTH * 4
    node = per_node or 2
    rows = {(a, b): sent_splits(a, size)[b] for a in range(size) for b in range(size)}
    for rank, (*_, traffic) in enumerate(run_ranks(_exchange, size, per_node, torch.float32)):
        there = back = far_there = far_back = 0
        for (source, target), count in rows.items():
            is_far = source // node != target // node
            hops = [(source, target, is_far)]
            if per_node is not None:
                middle = source // node * node + target % node
                hops = [(source, middle, False), (middle, target, is_far)]
            for a, b, far in hops:
                there += count * (a == rank != b)
                back += count * (b == rank != a)
                far_there += count * (far and a == rank != b)
                far_back += count * (far and b == rank != a)
        assert traffic.sent_bytes == (there + 2 * back) * row_bytes
        assert traffic.between_nodes_bytes == (far_there + 2 * far_back) * row_bytes


def _in_format(
    rank: int, size: int, per_node: int | None, formats: RowFormats, is_permuted: bool
) -> dict[str, Any]:
    exchange = make_exchange(size, per_node)
    route = make_route(rank, size, exchange)
    generator = torch.Generator().manual_seed(rank)
    num_rows = sum(route.send_splits_list)
    ids_TK = torch.randint(0, 2, (num_rows, 1), generator=generator)
    row_of_slot_TK, slot_of_row_N, _ = expert_order(ids_TK, 2)
    x_TD = torch.randn(num_rows, 40, generator=generator, requires_grad=True)
    if is_permuted:
        received = exchange.permuted_rows(x_TD, slot_of_row_N, row_of_slot_TK, route, formats)
    else:
        rows_ND = permute(x_TD, slot_of_row_N, row_of_slot_TK)
        received = exchange.rows(rows_ND, route, formats)
    grad = torch.randn(received.shape, generator=generator)
    received.backward(grad)
    sent_bytes = exchange.meter.read().sent_bytes
    plain_there = exchange.send(x_TD.detach()[slot_of_row_N], route)
    plain_back = exchange.send(grad, route.back())[row_of_slot_TK[:, 0]]
    return {
        "received": received.detach(),
        "plain": plain_there,
        "grad": x_TD.grad,
        "plain grad": plain_back,
        "raw grad": grad,
        "rows": x_TD.detach()[slot_of_row_N],
        "row_of_slot": row_of_slot_TK[:, 0],
        "bytes": sent_bytes,
    }


def through_wire(rows_ND: Tensor, format: WireFormat | None) -> Tensor:
    if format is None:
        return rows_ND
    return unpack(pack(rows_ND, format), format, rows_ND.shape[1], rows_ND.dtype)


@pytest.mark.parametrize(("size", "per_node"), [(1, None), (4, None), (4, 2)])
@pytest.mark.parametrize("is_permuted", [False, True])
@pytest.mark.parametrize(
    "formats",
    [
        RowFormats(forward=WireFormat(kind="int8")),
        RowFormats(backward=WireFormat(kind="int4", block=10)),
        RowFormats(backward=WireFormat(kind="e5m2", is_stochastic=True)),
        RowFormats(
            forward=WireFormat(kind="e4m3", block=16, hands_on=True),
            backward=WireFormat(kind="int8", is_stochastic=True),
        ),
    ],
    ids=["int8 there", "int4 back", "e5m2 back", "both"],
)
def test_rows_travel_in_their_format(size, per_node, formats, is_permuted):
    """What arrives is what the format makes of what was sent, bit for bit and byte for byte, by every way."""
    results = run_ranks(_in_format, size, per_node, formats, is_permuted)
    sent = [through_wire(r["rows"], formats.forward) for r in results]
    sent_back = [through_wire(r["raw grad"], formats.backward) for r in results]
    for rank, result in enumerate(results):
        there = [s.split(sent_splits(p, size))[rank] for p, s in enumerate(sent)]
        assert torch.equal(result["received"], torch.cat(there))
        back = [s.split(received_splits(p, size))[rank] for p, s in enumerate(sent_back)]
        assert torch.equal(result["grad"], torch.cat(back)[result["row_of_slot"]])
        for name, way in (("received", "plain"), ("grad", "plain grad")):
            torch.testing.assert_close(result[name], result[way], rtol=0.3, atol=0.2)
        if per_node is None:
            widths = [
                160 if f is None else f.row_bytes(40) for f in (formats.forward, formats.backward)
            ]
            away = [
                sum(n for p, n in enumerate(splits(rank, size)) if p != rank)
                for splits in (sent_splits, received_splits)
            ]
            assert result["bytes"] == widths[0] * away[0] + widths[1] * away[1]


def _counts(rank: int, size: int):
    exchange = FlatExchange(dist.group.WORLD)
    return exchange.counts(torch.arange(size * 2).view(size, 2) + 100 * rank).tolist()


def test_counts_go_to_the_rank_they_are_meant_for():
    for rank, received in enumerate(run_ranks(_counts, 3)):
        assert received == [[100 * p + 2 * rank, 100 * p + 2 * rank + 1] for p in range(3)]
