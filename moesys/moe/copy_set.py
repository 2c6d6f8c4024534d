"""Copies of experts that take one route: on their way, here, and their gradients' way home.

Shapes: O own experts, C copies of the set, E experts of the layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moesys.ops.autocast import compute_type
from moesys.ops.chunks import add_chunks
from moesys.ops.shard import local_tensor
from moesys.parallel.sparse import Gather, Reduce, SparseCollectives
from moesys.plan.chunk_routes import ChunkRoute
from moesys.plan.placement import Placement

PARAMETERS = ("gate_up", "down")
"""Of experts, of which each is moved by collectives of its own."""


@dataclass(kw_only=True, eq=False)
class CopySet:
    """Of one layer, on one rank, for a step."""

    experts: nn.Module
    """With `PARAMETERS`, [O, ...] each."""
    placement: Placement
    """Owners, and who holds the copies of this set, each rank's in the order of `route.arrivals`."""
    route: ChunkRoute
    collectives: SparseCollectives
    is_begun: bool = False
    """Gathered, once or more."""
    _gathers: list[Gather] = field(default_factory=list)
    _flats: tuple[Tensor, ...] = ()
    """Memory of the copies, one after the other; without storage while released."""
    _are_here: bool = False
    _sums: tuple[Tensor, ...] = ()
    """Of the copies' gradients, in fp32 (fp64 of fp64)."""
    _reduces: list[Reduce] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Of copies that this rank holds."""
        return len(self.placement.copies(self.collectives.rank))

    def begin(self) -> None:
        """Start to gather, unless that was done. Collective."""
        if self._gathers or self._are_here or not self.route.stages:
            return
        self.is_begun = True
        for index, own in enumerate(self._own()):
            flat = self._flats[index] if self._flats else None
            like = compute_type(own.flatten()[:0]) if flat is None else flat
            self._gathers.append(
                self.collectives.begin_gather(
                    self._by_expert(own), self._sizes(own), self.route, like, flat
                )
            )

    def advance(self) -> None:
        """What waits on its way goes on. Collective."""
        for pending in (*self._gathers, *self._reduces):
            pending.advance()

    def wait(self) -> None:
        """Until all are here. Collective."""
        if self._are_here:
            return
        self.begin()
        flats = [gather.wait() for gather in self._gathers] or [own[:0] for own in self._own()]
        self._flats, self._gathers, self._are_here = tuple(flats), [], True

    def parameters(self) -> tuple[Tensor, ...]:
        """[C, ...] each, differentiable: gradients are summed for the owners. They are here."""
        weights = tuple(
            flat.view(-1, *own.shape[1:])
            for flat, own in zip(self._flats, self._own(), strict=True)
        )
        if not torch.is_grad_enabled():
            return weights
        anchor = self._flats[0].new_empty(0, requires_grad=True)
        return _Summed.apply(self, anchor, *weights)

    def free(self) -> None:
        """Their storage alone: what autograd has saved are views of it, good again once it is filled."""
        for flat in self._flats if self.route.stages else ():
            flat.untyped_storage().resize_(0)
        self._are_here = False

    def add(self, grads: Sequence[Tensor]) -> None:
        """Of one backward."""
        if self._sums:
            for total, grad in zip(self._sums, grads, strict=True):
                total.add_(grad)
            return
        self._sums = tuple(grad.to(_wide(grad.dtype), copy=True) for grad in grads)

    def send_gradients(self) -> None:
        """Home, those that were added since the last time. Collective."""
        if not self.route.stages:
            return
        self.settle()
        arrived = self.route.arrivals(self.collectives.rank)
        for index, own in enumerate(self._own()):
            like = own.flatten()[:0].to(_wide(own.dtype))
            total = (
                self._sums[index] if self._sums else like.new_zeros(len(arrived), *own.shape[1:])
            )
            copies = dict(zip(arrived, (part.flatten() for part in total), strict=True))
            self._reduces.append(
                self.collectives.begin_reduce(copies, self._sizes(own), self.route, like)
            )
        self._sums = ()

    def settle(self) -> None:
        """Add what others' copies have sent to the gradients of own experts. Collective where that is on its way."""
        place = {expert: i for i, expert in enumerate(self._owned)}
        for name, reduce in zip(PARAMETERS, self._reduces, strict=False):
            parameter = getattr(self.experts, name)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            own = local_tensor(parameter.grad).unbind()
            add_chunks([(part, own[place[expert]]) for expert, part in reduce.wait()])
        self._reduces = []

    @property
    def _owned(self) -> list[int]:
        return self.placement.own(self.collectives.rank)

    def _own(self) -> list[Tensor]:
        return [local_tensor(getattr(self.experts, name)).detach() for name in PARAMETERS]

    def _by_expert(self, own: Tensor) -> dict[int, Tensor]:
        return dict(zip(self._owned, own.unbind(), strict=True))

    def _sizes(self, own: Tensor) -> list[int]:
        return [math.prod(own.shape[1:])] * self.placement.num_experts


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which gradients are summed."""
    return torch.promote_types(dtype, torch.float32)


class _Summed(torch.autograd.Function):
    """The copies; their gradients are kept for their owners."""

    @staticmethod
    def forward(ctx, copies: CopySet, anchor: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.copies = copies
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        ctx.copies.add(grads)
        return None, None, *(None for _ in grads)
