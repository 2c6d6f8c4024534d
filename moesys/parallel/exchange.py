"""The exchange of rows between the ranks of an expert group: an all-to-all with uneven splits; and one with even ones.

Shapes: N rows sent, R rows received, D model, P ranks of the group.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.ops import permute, unpermute
from moesys.ops.wire import WireFormat, pack, unpack
from moesys.parallel.tensor import all_gather_single


@dataclass
class ExchangeMeter:
    """Exact bytes sent to other ranks, and time spent, since the last `read`.

    On GPUs the time is taken with events and read without a sync on the path; on CPUs it is wall time, which
    includes waiting for slower peers.
    """

    sent_bytes: int = 0
    plain_bytes: int = 0
    """That the same rows would have as they are, not written in few bits."""
    between_nodes_bytes: int = 0
    """Of those sent, to ranks on other nodes."""
    wall_s: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def read(self) -> "Traffic":
        """What was sent, and start over. Waits for the device's pending exchanges."""
        seconds = self.wall_s
        for start, end in self.events:
            end.synchronize()
            seconds += start.elapsed_time(end) / 1e3
        traffic = Traffic(self.sent_bytes, self.plain_bytes, self.between_nodes_bytes, seconds)
        self.sent_bytes, self.plain_bytes, self.between_nodes_bytes = 0, 0, 0
        self.wall_s, self.events = 0.0, []
        return traffic


class Traffic(NamedTuple):
    """Of one rank."""

    sent_bytes: int
    plain_bytes: int
    between_nodes_bytes: int
    seconds: float

    @classmethod
    def total(cls, parts: Iterable["Traffic"]) -> "Traffic":
        parts = list(parts)
        return cls(
            sum(part.sent_bytes for part in parts),
            sum(part.plain_bytes for part in parts),
            sum(part.between_nodes_bytes for part in parts),
            sum(part.seconds for part in parts),
        )


@dataclass(frozen=True, kw_only=True)
class RowFormats:
    """How rows are written on the wire, and how their gradients; None = as they are."""

    forward: WireFormat | None = None
    backward: WireFormat | None = None


UNCHANGED = RowFormats()


@dataclass(frozen=True, kw_only=True)
class Route:
    """How many rows go where, and by which way: integers on the host."""

    send_splits_list: list[int]
    """Rows for each rank of the group."""
    recv_splits_list: list[int]
    """Rows from each rank."""
    through_list: list[int] = field(default_factory=list)
    """Further counts that the exchange asked for (`Exchange.through`)."""
    is_back: bool = False
    """Whether rows go back to where they came from: what was received is sent."""

    def back(self) -> "Route":
        """The way back."""
        return replace(self, is_back=not self.is_back)

    @property
    def num_arrivals(self) -> int:
        """Rows that come to this rank."""
        return sum(self.send_splits_list if self.is_back else self.recv_splits_list)


class FlatExchange:
    """One all_to_all_single among all ranks of the group, differentiable: its backward is the way back.

    Rank r of the job is on node r // ranks_per_node, for the meter; None = on one node.
    """

    num_through = 0
    """Counts that `through` gives."""

    def __init__(self, group: dist.ProcessGroup, ranks_per_node: int | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        nodes = [r // (ranks_per_node or 2**31) for r in dist.get_process_group_ranks(group)]
        self.is_away_P = [node != nodes[self.rank] for node in nodes]
        """Which ranks are on other nodes."""
        self.meter = ExchangeMeter()

    def counts(self, counts_PL: Tensor) -> Tensor:
        """Tell each rank how many rows it will get: row p of the result came from rank p. int64 [P, L]."""
        received_PL = torch.empty_like(counts_PL)
        self._all_to_all(received_PL, counts_PL.contiguous(), None, None, self.group)
        return received_PL

    def gather(self, counts: Tensor) -> Tensor:
        """Every rank's `counts`, of one shape, stacked by rank."""
        gathered = counts.new_empty(self.size * counts.shape[0], *counts.shape[1:])
        all_gather_single(gathered, counts.contiguous(), group=self.group)
        return gathered.unflatten(0, (self.size, -1))

    def through(self, send_rows_P: Tensor) -> Tensor:
        """Counts of rows that pass through this rank, of all ranks' rows for each rank; int64 [num_through]. Collective."""
        return send_rows_P[:0]

    def through_known(self, rows_from: Callable[[Iterable[int]], list[list[int]]]) -> list[int]:
        """The same counts, where all know how many rows [P] each of some ranks sends. Not a collective."""
        return []

    def rows(self, rows_ND: Tensor, route: Route, formats: RowFormats = UNCHANGED) -> Tensor:
        """Send rows in order of the rank they are for; return those received, by source rank."""
        return _ExchangeRows.apply(rows_ND, self, route, formats)

    def permuted_rows(
        self,
        x_TD: Tensor,
        slot_of_row_N: Tensor,
        row_of_slot_TK: Tensor,
        route: Route,
        formats: RowFormats = UNCHANGED,
    ) -> Tensor:
        """`rows(permute(x_TD, slot_of_row_N, row_of_slot_TK))`, rows written for the wire as they are gathered."""
        if formats.forward is None:
            return self.rows(permute(x_TD, slot_of_row_N, row_of_slot_TK), route, formats)
        return _ExchangePermuted.apply(x_TD, slot_of_row_N, row_of_slot_TK, self, route, formats)

    def send(self, rows_ND: Tensor, route: Route, plain_row_bytes: int | None = None) -> Tensor:
        """`rows` of any type, without autograd. `plain_row_bytes`: of a row as it is, where it was written in few bits."""
        send, recv = route.send_splits_list, route.recv_splits_list
        if route.is_back:
            send, recv = recv, send
        received_RD = self._send(rows_ND, send, recv, self.group)
        self._count(rows_ND, send, self.rank, self.is_away_P, plain_row_bytes)
        return received_RD

    def _send(
        self,
        rows_ND: Tensor,
        send_splits_list: list[int],
        recv_splits_list: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        rows_ND = rows_ND.contiguous()
        received_RD = rows_ND.new_empty((sum(recv_splits_list), *rows_ND.shape[1:]))
        self._all_to_all(received_RD, rows_ND, recv_splits_list, send_splits_list, group)
        return received_RD

    def _count(
        self,
        rows_ND: Tensor,
        send_splits_list: list[int],
        own: int,
        is_away: list[bool],
        plain_row_bytes: int | None,
    ) -> None:
        row_bytes = rows_ND.element_size() * rows_ND[:1].numel() if rows_ND.shape[0] else 0
        sent = sum(send_splits_list) - send_splits_list[own]
        away = sum(rows for rows, far in zip(send_splits_list, is_away, strict=True) if far)
        self.meter.sent_bytes += sent * row_bytes
        self.meter.plain_bytes += sent * (plain_row_bytes or row_bytes)
        self.meter.between_nodes_bytes += away * row_bytes

    def _all_to_all(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: list[int] | None,
        input_splits: list[int] | None,
        group: dist.ProcessGroup,
    ) -> None:
        if source.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            dist.all_to_all_single(output, source, output_splits, input_splits, group)
            end.record()
            self.meter.events.append((start, end))
        else:
            began = time.perf_counter()
            dist.all_to_all_single(output, source, output_splits, input_splits, group)
            self.meter.wall_s += time.perf_counter() - began


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, rows_ND: Tensor, exchange: FlatExchange, route: Route, formats: RowFormats
    ) -> Tensor:
        ctx.exchange, ctx.route, ctx.formats = exchange, route, formats
        return _sent(rows_ND, exchange, route, formats.forward)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):  # type: ignore[override]
        grad_ND = _sent(grad_RD, ctx.exchange, ctx.route.back(), ctx.formats.backward)
        return grad_ND, None, None, None


class _ExchangePermuted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_TD: Tensor,
        slot_of_row_N: Tensor,
        row_of_slot_TK: Tensor,
        exchange: FlatExchange,
        route: Route,
        formats: RowFormats,
    ) -> Tensor:
        ctx.exchange, ctx.route, ctx.formats = exchange, route, formats
        ctx.save_for_backward(row_of_slot_TK)
        format = formats.forward
        assert format is not None
        bytes_NW = pack(x_TD, format, slot_of_row_N, row_of_slot_TK.shape[1])
        return _sent_written(bytes_NW, x_TD, exchange, route, format)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):  # type: ignore[override]
        grad_ND = _sent(grad_RD, ctx.exchange, ctx.route.back(), ctx.formats.backward)
        (row_of_slot_TK,) = ctx.saved_tensors
        ones_TK = torch.ones_like(
            row_of_slot_TK, dtype=torch.promote_types(grad_ND.dtype, torch.float32)
        )
        grad_TD = unpermute(grad_ND, ones_TK, row_of_slot_TK)
        return grad_TD, None, None, None, None, None


def _sent(
    rows_ND: Tensor, exchange: FlatExchange, route: Route, format: WireFormat | None
) -> Tensor:
    """Rows sent in `format`; what arrives is as near to the numbers as that is."""
    if format is None:
        return exchange.send(rows_ND, route)
    return _sent_written(pack(rows_ND, format), rows_ND, exchange, route, format)


def _sent_written(
    bytes_NW: Tensor, like_XD: Tensor, exchange: FlatExchange, route: Route, format: WireFormat
) -> Tensor:
    d = like_XD.shape[1]
    received_RW = exchange.send(bytes_NW, route, d * like_XD.element_size())
    return unpack(received_RW, format, d, like_XD.dtype)


def swap(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send x[p] to the group's p-th rank; return by source rank what came. Its own inverse and its own backward."""
    return _Swap.apply(x, group)


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _swapped(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _swapped(grad, ctx.group), None


def _swapped(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received
