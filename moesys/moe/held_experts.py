"""Experts of which this rank is the owner, and copies of other ranks' for a while.

Shapes: D model, F hidden, O own experts, C copies, L = O + C, R rows in order of them, E experts of the layer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesys.moe.experts import grouped_swiglu
from moesys.ops.autocast import compute_type
from moesys.ops.grouped_linear import GroupedBackend
from moesys.ops.shard import local_tensor, set_rows
from moesys.parallel.sparse import Gather, Reduce, SparseCollectives
from moesys.plan.chunk_routes import ChunkRoute
from moesys.plan.placement import Placement

PARAMETERS = ("gate_up", "down")
"""Of which each is moved by collectives of its own."""


class HeldExperts(nn.Module):
    """As `Experts`, of any number of a layer's experts; and between a gather and a reduction, copies of others."""

    def __init__(self, gate_up: nn.Parameter, down: nn.Parameter, owned: Sequence[int]) -> None:
        """[O, 2, F, D] and [O, D, F], or DTensors with these as their local parts. `owned`: which experts, ascending."""
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.owned = tuple(owned)
        self.backend: GroupedBackend = "grouped_mm"
        self._say_rows()

    def classes(self) -> list[Self]:
        """This one: all are of one width."""
        return [self]

    def own(self, owned: Sequence[int]) -> None:
        """The parameters' local parts have become those of these experts, ascending."""
        self.owned = tuple(owned)
        self._say_rows()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What moves parameters makes them anew."""
        super()._apply(fn, recurse)
        self._say_rows()
        return self

    def _say_rows(self) -> None:
        for parameter in self.parameters():
            if isinstance(parameter, DTensor):
                set_rows(parameter, self.owned)

    def forward(
        self,
        rows_RD: Tensor,
        tokens_per_expert_L: Tensor,
        rows_list: Sequence[int],
        copies: "LayerCopies",
    ) -> Tensor:
        """Return [R, D]; `rows_list` are those for own experts and those for copies."""
        rows_RD = _Reached.apply(rows_RD, copies) if rows_RD.requires_grad else rows_RD
        gate_up, down = local_tensor(self.gate_up), local_tensor(self.down)
        num_own, num_held = len(gate_up), len(tokens_per_expert_L)
        parts = zip(
            ((gate_up, down), copies.parameters()),
            rows_RD.split(list(rows_list)),
            tokens_per_expert_L.split([num_own, num_held - num_own]),
            strict=True,
        )
        out = [
            grouped_swiglu(rows_RD, gate_up, down, counts_L, self.backend)
            for (gate_up, down), rows_RD, counts_L in parts
            if len(counts_L)
        ]
        return torch.cat(out) if out else rows_RD


@dataclass(kw_only=True, eq=False)
class LayerCopies:
    """One materialisation of a layer's copies, for the forwards of one or more micro-steps and `backwards` backwards."""

    experts: HeldExperts
    placement: Placement
    route: ChunkRoute
    collectives: SparseCollectives
    backwards: int
    _gathers: list[Gather] = field(default_factory=list)
    _weights: tuple[Tensor, ...] = ()
    _sums: tuple[Tensor, ...] = ()
    """Of the copies' gradients, in fp32 (fp64 of fp64)."""
    _reduces: list[Reduce] = field(default_factory=list)
    _done: int = 0

    def begin(self) -> None:
        """Start to gather, unless that was done. Collective."""
        if self._gathers or not self.route.stages:
            return
        for own in self._own():
            like = compute_type(own.flatten()[:0])
            self._gathers.append(
                self.collectives.begin_gather(
                    self._by_expert(own), self._sizes(own), self.route, like
                )
            )

    def parameters(self) -> tuple[Tensor, ...]:
        """[C, ...] each, differentiable: gradients are summed for the owners. Collective where they are on their way."""
        if not self._weights:
            self.begin()
            flats = [gather.wait() for gather in self._gathers] or [own[:0] for own in self._own()]
            self._weights = tuple(
                flat.view(-1, *own.shape[1:]) for flat, own in zip(flats, self._own(), strict=True)
            )
            self._gathers = []
        if not torch.is_grad_enabled():
            return self._weights
        return _Summed.apply(self._weights[0].new_empty(0, requires_grad=True), self)

    def add(self, grads: Sequence[Tensor]) -> None:
        """Of one backward."""
        if self._sums:
            for total, grad in zip(self._sums, grads, strict=True):
                total.add_(grad)
            return
        self._sums = tuple(grad.to(_wide(grad.dtype), copy=True) for grad in grads)

    def end_backward(self) -> None:
        """One has reached this layer's rows; the last starts the gradients' way to owners. Collective."""
        self._done += 1
        if self._done < self.backwards or not self.route.stages:
            return
        arrived = self.route.arrivals(self.collectives.rank)
        sums = self._sums or tuple(map(torch.zeros_like, self._weights))
        for own, total in zip(self._own(), sums, strict=True):
            copies = dict(zip(arrived, (part.flatten() for part in total), strict=True))
            like = own.flatten()[:0].to(_wide(own.dtype))
            self._reduces.append(
                self.collectives.begin_reduce(copies, self._sizes(own), self.route, like)
            )
        self._weights, self._sums = (), ()

    def finish(self) -> None:
        """Add what others' copies got to the gradients of own experts. Collective."""
        place = {expert: i for i, expert in enumerate(self._owned)}
        for name in PARAMETERS:
            parameter = getattr(self.experts, name)
            if parameter.grad is None:  # of no expert
                parameter.grad = torch.zeros_like(parameter)
        for name, reduce in zip(PARAMETERS, self._reduces, strict=False):
            grad = local_tensor(getattr(self.experts, name).grad)
            for expert, part in reduce.wait():
                own = grad[place[expert]]
                own.add_(part.view_as(own))
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


class _Reached(torch.autograd.Function):
    """The identity, that tells when a backward has come through all experts that read these rows."""

    @staticmethod
    def forward(ctx, rows_RD: Tensor, copies: LayerCopies) -> Tensor:
        ctx.copies = copies
        return rows_RD.view_as(rows_RD)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):  # type: ignore[override]
        ctx.copies.end_backward()
        return grad_RD, None


class _Summed(torch.autograd.Function):
    """The copies; their gradients are kept for their owners."""

    @staticmethod
    def forward(ctx, anchor: Tensor, copies: LayerCopies) -> tuple[Tensor, ...]:
        ctx.copies = copies
        return tuple(weight.view_as(weight) for weight in copies._weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        ctx.copies.add(grads)
        return None, None
