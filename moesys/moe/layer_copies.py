"""What a rank holds of other ranks' experts for one step: gathered, used, and their gradients sent home.

Shapes: D model, O own experts, C copies, R rows, E experts of the layer.
"""

import math
from collections.abc import Callable, Sequence
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


def nothing() -> None:
    """To be done."""


@dataclass(kw_only=True, eq=False)
class LayerCopies:
    """Of one layer, for the forwards of one or more micro-steps and `backwards` backwards.

    They are gathered once, and the sums of their gradients go home after the last backward. With `releases` (Hecate-RM,
    2502.02581, section 4.4) their memory is free between a forward and its backward, which gathers them again, and each
    backward sends its gradients home.
    """

    experts: nn.Module
    """With `PARAMETERS`, [O, ...] each."""
    placement: Placement
    route: ChunkRoute
    collectives: SparseCollectives
    backwards: int
    releases: bool = False
    at_forward: Callable[[], None] = nothing
    """Done when experts begin to compute."""
    at_backward: Callable[[], None] = nothing
    """And when their backward does."""
    after_backward: Callable[[], None] = nothing
    """Done when the experts' backward is through."""
    was_begun: bool = False
    """Gathered, once or more."""
    _gathers: list[Gather] = field(default_factory=list)
    _flats: tuple[Tensor, ...] = ()
    """Memory of the copies, one after the other; without storage while released."""
    _are_here: bool = False
    _in_backward: bool = False
    _sums: tuple[Tensor, ...] = ()
    """Of the copies' gradients, in fp32 (fp64 of fp64)."""
    _reduces: list[Reduce] = field(default_factory=list)
    _done: int = 0
    _are_summed: bool = False
    """Gradients that are to leave."""

    def begin(self) -> None:
        """Start to gather, unless that was done. Collective."""
        if self._gathers or self._are_here or not self.route.stages:
            return
        self.was_begun = True
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

    def parameters(self) -> tuple[Tensor, ...]:
        """[C, ...] each, differentiable: gradients are summed for the owners. Collective where they are on their way."""
        self._wait()
        self.at_forward()
        weights = tuple(
            flat.view(-1, *own.shape[1:])
            for flat, own in zip(self._flats, self._own(), strict=True)
        )
        if not torch.is_grad_enabled():
            return weights
        anchor = self._flats[0].new_empty(0, requires_grad=True)
        return _Summed.apply(self, anchor, *weights)

    def end_forward(self) -> None:
        """They are not needed before this forward's backward."""
        if self.releases and not self._in_backward:
            self._free()

    def begin_backward(self) -> None:
        """They are needed again. Collective where they are not there."""
        self._in_backward = True
        self.begin()
        self._wait()
        self.at_backward()

    def add(self, grads: Sequence[Tensor]) -> None:
        """Of one backward."""
        if self._sums:
            for total, grad in zip(self._sums, grads, strict=True):
                total.add_(grad)
            return
        self._sums = tuple(grad.to(_wide(grad.dtype), copy=True) for grad in grads)

    def end_backward(self) -> None:
        """One has reached this layer's rows."""
        self._in_backward = False
        self._done += 1
        is_last = self._done == self.backwards
        if self.releases or is_last:
            self._are_summed = True
            self._free()
        self.after_backward()

    def send_gradients(self) -> None:
        """Home, if they are summed and did not leave yet. Collective."""
        if self._are_summed:
            self._are_summed = False
            self._begin_reduce()

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

    def finish(self) -> None:
        """Of a step: all gradients are there, also of no expert. Collective."""
        self.send_gradients()
        self.settle()
        for name in PARAMETERS:
            parameter = getattr(self.experts, name)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _wait(self) -> None:
        if self._are_here:
            return
        self.begin()
        flats = [gather.wait() for gather in self._gathers] or [own[:0] for own in self._own()]
        self._flats, self._gathers, self._are_here = tuple(flats), [], True

    def _free(self) -> None:
        """Their storage alone: what autograd has saved are views of it, good again once it is filled."""
        for flat in self._flats if self.route.stages else ():
            flat.untyped_storage().resize_(0)
        self._are_here = False

    def _begin_reduce(self) -> None:
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


def entered(rows_RD: Tensor, copies: LayerCopies) -> Tensor:
    """The rows, before the experts that read them: a backward that reaches them has come through all of these."""
    return _Passed.apply(rows_RD, copies.end_backward) if rows_RD.requires_grad else rows_RD


def left(rows_RD: Tensor, copies: LayerCopies) -> Tensor:
    """The results, after the experts."""
    copies.end_forward()
    return _Passed.apply(rows_RD, copies.begin_backward) if rows_RD.requires_grad else rows_RD


class _Passed(torch.autograd.Function):
    """The identity, whose backward first calls something."""

    @staticmethod
    def forward(ctx, rows_RD: Tensor, at_backward: Callable[[], None]) -> Tensor:
        ctx.at_backward = at_backward
        return rows_RD.view_as(rows_RD)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):  # type: ignore[override]
        ctx.at_backward()
        return grad_RD, None


class _Summed(torch.autograd.Function):
    """The copies; their gradients are kept for their owners."""

    @staticmethod
    def forward(ctx, copies: LayerCopies, anchor: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.copies = copies
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        ctx.copies.add(grads)
        return None, None, *(None for _ in grads)
