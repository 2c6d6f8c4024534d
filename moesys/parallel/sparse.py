"""Sparse collectives: chunks from their owners to the ranks that hold copies, and sums of gradients back to the owners
(Hecate's SparseAllGather and SparseReduceScatter, 2502.02581, section 3.2).

A chunk is what one parameter has of one expert; experts may have different numbers of them. Which rank sends what to whom was
planned (plan/chunk_routes.py); each stage of a route is one all-to-all.

Shapes: C copies of this rank, in the order in which they arrive.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.ops.chunks import add_chunks, pack_chunks
from moesys.parallel.exchange import ExchangeMeter
from moesys.plan.chunk_routes import ChunkRoute, Hop, Stage

Length = tuple[int, int]
"""A rank, and how many numbers are for it or from it."""


class SparseCollectives:
    """Between the ranks of a group, whose ranks r are on node r // per_node of it."""

    def __init__(self, group: dist.ProcessGroup, per_node: int) -> None:
        self.group, self.per_node = group, per_node
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.meter = ExchangeMeter()

    def begin_gather(
        self,
        own: Mapping[int, Tensor],
        sizes_E: Sequence[int],
        route: ChunkRoute,
        like: Tensor,
        into: Tensor | None = None,
    ) -> "Gather":
        """Start to send what others need; `own` are the chunks whose owner this rank is, by expert. Collective.

        They travel in the type of `like`, and copies are on its device. `sizes_E`: numbers of each expert's chunk. Chunks must not change before the result
        was waited for. `into`: the `flat` of an earlier gather by the same route, whose storage may have been freed; what autograd has
        saved of it counts as unchanged.
        """
        return Gather(self, own, sizes_E, route, like, into)

    def begin_reduce(
        self, copies: Mapping[int, Tensor], sizes_E: Sequence[int], route: ChunkRoute, like: Tensor
    ) -> "Reduce":
        """Start to send gradients home. Collective.

        `copies`: by expert, 1-d, of all of which this rank has a copy; they are summed in place with what passes through.
        `like`: of their type and device.
        """
        return Reduce(self, copies, sizes_E, route, like)

    def exchange(
        self, send: Tensor, sent: Iterable[Length], received: Tensor, come: Iterable[Length]
    ) -> dist.Work | None:
        """Numbers for ranks, and from ranks, in order of these; asynchronous."""
        send_to, from_ = self._per_rank(sent), self._per_rank(come)
        width, node = send.element_size(), self.rank // self.per_node
        away = (n for rank, n in enumerate(send_to) if rank // self.per_node != node)
        self.meter.sent_bytes += sum(send_to) * width
        self.meter.plain_bytes += sum(send_to) * width
        self.meter.between_nodes_bytes += sum(away) * width
        return dist.all_to_all_single(
            received, send, from_, send_to, group=self.group, async_op=True
        )

    def _per_rank(self, lengths: Iterable[Length]) -> list[int]:
        numbers = [0] * self.size
        for rank, number in lengths:
            numbers[rank] += number
        return numbers

    def wait(self, work: dist.Work | None) -> None:
        began = time.perf_counter()
        if work is not None:
            work.wait()
        self.meter.wall_s += time.perf_counter() - began


@dataclass
class _Pending:
    """A stage on its way; its buffers live as long."""

    work: dist.Work | None
    send: Tensor
    received: Tensor
    hops: list[Hop]
    """Of those that come to this rank."""


class _Staged(ABC):
    """One stage after the other."""

    _left: list[Stage]
    _pending: _Pending | None

    def advance(self) -> None:
        """Wait for the stage that is under way, and start the next. Collective."""
        if self._pending is not None and self._left:
            self._end(self._pending)

    def _finish(self) -> None:
        while self._pending is not None:
            self._end(self._pending)

    @abstractmethod
    def _end(self, pending: _Pending) -> None:
        """Wait for a stage, take what came, and start the next."""


@dataclass
class Gather(_Staged):
    """Copies on their way to this rank."""

    collectives: SparseCollectives
    own: Mapping[int, Tensor]
    sizes_E: Sequence[int]
    route: ChunkRoute
    like: Tensor
    into: Tensor | None
    flat: Tensor = field(init=False)
    """All copies of this rank one after the other, in order of arrival; whole once waited for."""
    copies: dict[int, Tensor] = field(init=False)
    """Views of it by expert, 1-d."""

    def __post_init__(self) -> None:
        arriving = self.route.arrivals(self.collectives.rank)
        sizes = [self.sizes_E[expert] for expert in arriving]
        if self.into is None:
            self.flat = self.like.new_empty(sum(sizes))
        else:
            self.flat = self.into
            self.flat.untyped_storage().resize_(self.flat.nbytes)
        self.copies = dict(zip(arriving, self.flat.split(sizes), strict=True))
        self._place = 0
        self._left = list(self.route.stages)
        self._pending: _Pending | None = None
        self._begin_next()

    def wait(self) -> Tensor:
        """Return `flat`. Collective."""
        self._finish()
        return self.flat

    def _end(self, pending: _Pending) -> None:
        self.collectives.wait(pending.work)
        self._pending = None
        self._begin_next()

    def _begin_next(self) -> None:
        if not self._left:
            return
        stage, rank = self._left.pop(0), self.collectives.rank
        sent = [hop for hop in stage if hop.source == rank]
        has = {**self.copies, **self.own}
        send = pack_chunks([has[hop.expert] for hop in sent], self.flat)
        come = [hop for hop in stage if hop.dest == rank]
        begin, self._place = self._place, self._place + sum(self.sizes_E[h.expert] for h in come)
        received = self.flat[begin : self._place]
        with torch.autograd._unsafe_preserve_version_counter(self.flat):
            work = self.collectives.exchange(
                send,
                [(hop.dest, self.sizes_E[hop.expert]) for hop in sent],
                received,
                [(hop.source, self.sizes_E[hop.expert]) for hop in come],
            )
        self._pending = _Pending(work, send, received, come)


@dataclass
class Reduce(_Staged):
    """Gradients on their way to owners."""

    collectives: SparseCollectives
    copies: Mapping[int, Tensor]
    sizes_E: Sequence[int]
    route: ChunkRoute
    like: Tensor

    def __post_init__(self) -> None:
        self._home: list[tuple[int, Tensor]] = []
        self._left: list[Stage] = list(self.route.stages)
        self._pending: _Pending | None = None
        self._begin_next()

    def wait(self) -> list[tuple[int, Tensor]]:
        """(expert, a part of its gradient's sum, 1-d) of what came to this rank as an owner, in a fixed order. Collective."""
        self._finish()
        return self._home

    def _end(self, pending: _Pending) -> None:
        self.collectives.wait(pending.work)
        experts = [hop.expert for hop in pending.hops]
        sizes = [self.sizes_E[expert] for expert in experts]
        come = list(zip(experts, pending.received.split(sizes), strict=True))
        add_chunks([(part, self.copies[expert]) for expert, part in come if expert in self.copies])
        self._home += [(expert, part) for expert, part in come if expert not in self.copies]
        self._pending = None
        self._begin_next()

    def _begin_next(self) -> None:
        if not self._left:
            return
        stage, rank = self._left.pop(), self.collectives.rank
        sent = [hop for hop in stage if hop.dest == rank]
        come = [hop for hop in stage if hop.source == rank]
        # To each rank, and from each, in the order in which chunks went the other way.
        come.sort(key=lambda hop: (hop.dest, hop.source, hop.expert))
        send = pack_chunks([self.copies[hop.expert] for hop in sent], self.like)
        received = self.like.new_empty(sum(self.sizes_E[hop.expert] for hop in come))
        work = self.collectives.exchange(
            send,
            [(hop.source, self.sizes_E[hop.expert]) for hop in sent],
            received,
            [(hop.dest, self.sizes_E[hop.expert]) for hop in come],
        )
        self._pending = _Pending(work, send, received, come)


def sparse_all_gather(
    own: Mapping[int, Tensor],
    sizes_E: Sequence[int],
    route: ChunkRoute,
    collectives: SparseCollectives,
    like: Tensor,
) -> tuple[dict[int, Tensor], Tensor]:
    """This rank's copies by expert, 1-d, from the chunks [1-d] that ranks own; its backward sums gradients at owners.
    Waited for: training overlaps the same two steps with computation. All are of the type and on the device of `like`.
    Collective.

    Also returns a 0 that every rank adds to what it goes backward from, for ranks without a copy to take part.
    """
    experts, arrive = tuple(own), tuple(route.arrivals(collectives.rank))
    known = _Known(collectives, sizes_E, route, like, experts, arrive)
    zero, *copies = _SparseAllGather.apply(
        known, torch.zeros((), requires_grad=True), *own.values()
    )
    return dict(zip(arrive, copies, strict=True)), zero


def sparse_reduce_scatter(
    own: Mapping[int, Tensor],
    copies: Mapping[int, Tensor],
    sizes_E: Sequence[int],
    route: ChunkRoute,
    collectives: SparseCollectives,
    like: Tensor,
) -> tuple[dict[int, Tensor], Tensor]:
    """The sum of what all holders have of each chunk, at its owner; the mirror of `sparse_all_gather`. Collective."""
    experts, arrive = tuple(own), tuple(route.arrivals(collectives.rank))
    known = _Known(collectives, sizes_E, route, like, experts, arrive)
    tensors = *own.values(), *(copies[expert] for expert in arrive)
    zero, *sums = _SparseReduceScatter.apply(known, torch.zeros((), requires_grad=True), *tensors)
    return dict(zip(experts, sums, strict=True)), zero


class _Known(NamedTuple):
    collectives: SparseCollectives
    sizes_E: Sequence[int]
    route: ChunkRoute
    like: Tensor
    experts: tuple[int, ...]
    """Whose owner this rank is."""
    arrive: tuple[int, ...]

    def gathered(self, own: Sequence[Tensor]) -> tuple[Tensor, ...]:
        chunks = dict(zip(self.experts, own, strict=True))
        gather = self.collectives.begin_gather(chunks, self.sizes_E, self.route, self.like)
        gather.wait()
        return tuple(copy.clone() for copy in gather.copies.values())

    def reduced(self, own: Sequence[Tensor], copies: Sequence[Tensor]) -> tuple[Tensor, ...]:
        sums = {expert: chunk.clone() for expert, chunk in zip(self.experts, own, strict=True)}
        passing = {expert: copy.clone() for expert, copy in zip(self.arrive, copies, strict=True)}
        reduce = self.collectives.begin_reduce(passing, self.sizes_E, self.route, self.like)
        add_chunks([(part, sums[expert]) for expert, part in reduce.wait()])
        return tuple(sums.values())


class _SparseAllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, known: _Known, zero: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.known = known
        return zero.detach().clone(), *known.gathered(own)

    @staticmethod
    def backward(ctx, grad_zero: Tensor, *grads: Tensor):  # type: ignore[override]
        known = ctx.known
        zeros = [known.like.new_zeros(known.sizes_E[expert]) for expert in known.experts]
        return None, None, *known.reduced(zeros, grads)


class _SparseReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, known: _Known, zero: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.known = known
        number = len(known.experts)
        return zero.detach().clone(), *known.reduced(tensors[:number], tensors[number:])

    @staticmethod
    def backward(ctx, grad_zero: Tensor, *grads: Tensor):  # type: ignore[override]
        return None, None, *grads, *ctx.known.gathered(grads)
