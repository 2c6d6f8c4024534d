"""The exchange of rows between the ranks of an expert group: an all-to-all with uneven splits; and one with even ones.

Shapes: N rows sent, R rows received, D model, P ranks of the group.
"""

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel.tensor import all_gather_single


@dataclass
class ExchangeMeter:
    """Exact bytes sent to other ranks, and time spent, since the last `read`.

    On GPUs the time is taken with events and read without a sync on the path; on CPUs it is wall time, which
    includes waiting for slower peers.
    """

    sent_bytes: int = 0
    wall_s: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def read(self) -> tuple[int, float]:
        """Return (sent_bytes, seconds) and start over. Waits for the device's pending exchanges."""
        seconds = self.wall_s
        for start, end in self.events:
            end.synchronize()
            seconds += start.elapsed_time(end) / 1e3
        sent_bytes = self.sent_bytes
        self.sent_bytes, self.wall_s, self.events = 0, 0.0, []
        return sent_bytes, seconds


class FlatExchange:
    """One all_to_all_single among all ranks of the group, differentiable: its backward is the way back."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.meter = ExchangeMeter()

    def counts(self, counts_PL: Tensor) -> Tensor:
        """Tell each rank how many rows it will get: row p of the result came from rank p. int64 [P, L]."""
        received_PL = torch.empty_like(counts_PL)
        self._timed_all_to_all(received_PL, counts_PL.contiguous(), None, None)
        return received_PL

    def gather(self, counts: Tensor) -> Tensor:
        """Every rank's `counts`, of one shape, stacked by rank."""
        gathered = counts.new_empty(self.size * counts.shape[0], *counts.shape[1:])
        all_gather_single(gathered, counts.contiguous(), group=self.group)
        return gathered.unflatten(0, (self.size, -1))

    def rows(
        self, rows_ND: Tensor, send_splits_list: list[int], recv_splits_list: list[int]
    ) -> Tensor:
        """Send the first send_splits_list[0] rows to rank 0, and so on; return the rows received, by source rank."""
        return _ExchangeRows.apply(rows_ND, self, send_splits_list, recv_splits_list)

    def send(
        self, rows_ND: Tensor, send_splits_list: list[int], recv_splits_list: list[int]
    ) -> Tensor:
        """`rows` without autograd."""
        rows_ND = rows_ND.contiguous()
        received_RD = rows_ND.new_empty((sum(recv_splits_list), *rows_ND.shape[1:]))
        self._timed_all_to_all(received_RD, rows_ND, recv_splits_list, send_splits_list)
        row_bytes = rows_ND.element_size() * rows_ND[:1].numel() if rows_ND.shape[0] else 0
        away = sum(send_splits_list) - send_splits_list[self.rank]
        self.meter.sent_bytes += away * row_bytes
        return received_RD

    def _timed_all_to_all(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: list[int] | None,
        input_splits: list[int] | None,
    ) -> None:
        if source.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            dist.all_to_all_single(output, source, output_splits, input_splits, self.group)
            end.record()
            self.meter.events.append((start, end))
        else:
            began = time.perf_counter()
            dist.all_to_all_single(output, source, output_splits, input_splits, self.group)
            self.meter.wall_s += time.perf_counter() - began


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        rows_ND: Tensor,
        exchange: FlatExchange,
        send_splits_list: list[int],
        recv_splits_list: list[int],
    ) -> Tensor:
        ctx.exchange = exchange
        ctx.splits = (send_splits_list, recv_splits_list)
        return exchange.send(rows_ND, send_splits_list, recv_splits_list)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):  # type: ignore[override]
        send_splits_list, recv_splits_list = ctx.splits
        return ctx.exchange.send(grad_RD, recv_splits_list, send_splits_list), None, None, None


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
