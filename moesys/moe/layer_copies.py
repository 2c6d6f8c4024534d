"""What a rank holds of other ranks' experts for one step: gathered, used, and their gradients sent home.

Shapes: D model, C copies of a set, R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.moe.copy_set import PARAMETERS, CopySet
from moesys.plan.placement import Placement, with_more_copies


def nothing() -> None:
    """To be done."""


@dataclass(kw_only=True, eq=False)
class LayerCopies:
    """Of one layer, for the forwards of one or more micro-steps and `backwards` backwards.

    They are gathered once, and the sums of their gradients go home after the last backward. With `releases` (Hecate-RM,
    2502.02581, section 4.4) their memory is free between a forward and its backward, which gathers them again, and each
    backward sends its gradients home.
    """

    planned: CopySet
    backwards: int
    releases: bool = False
    at_forward: Callable[[], None] = nothing
    """Done when experts begin to compute."""
    at_backward: Callable[[], None] = nothing
    """And when their backward does."""
    after_backward: Callable[[], None] = nothing
    """Done when the experts' backward is through."""
    _in_backward: bool = False
    _done: int = 0
    _are_summed: bool = False
    """Gradients that are to leave."""

    def __post_init__(self) -> None:
        self.sets = [self.planned]
        self.placement: Placement = self.planned.placement
        """Of the copies of all sets, in their order."""

    @property
    def was_begun(self) -> bool:
        """Gathered, once or more."""
        return any(copies.is_begun for copies in self.sets)

    @property
    def held(self) -> list[int]:
        """Own experts, and copies of each set, on this rank."""
        own = self.placement.own(self.planned.collectives.rank)
        return [len(own), *(copies.number for copies in self.sets)]

    def extend(self, more: CopySet) -> None:
        """By copies of experts that their ranks do not hold, before anything has computed with the others. Collective."""
        self.sets.append(more)
        self.placement = with_more_copies(self.placement, more.placement.copies_PC)
        more.begin()

    def begin(self) -> None:
        """Start to gather, unless that was done. Collective."""
        for copies in self.sets:
            copies.begin()

    def advance(self) -> None:
        """What waits on its way goes on. Collective."""
        for copies in self.sets:
            copies.advance()

    def parameters(self) -> list[tuple[Tensor, ...]]:
        """[C, ...] each, of each set, differentiable. Collective where they are on their way."""
        self._wait()
        self.at_forward()
        return [copies.parameters() for copies in self.sets]

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
            for copies in self.sets:
                copies.send_gradients()

    def settle(self) -> None:
        """Add what others' copies have sent to the gradients of own experts. Collective where that is on its way."""
        for copies in self.sets:
            copies.settle()

    def finish(self) -> None:
        """Of a step: all gradients are there, also of no expert. Collective."""
        self.send_gradients()
        self.settle()
        for name in PARAMETERS:
            parameter = getattr(self.planned.experts, name)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _wait(self) -> None:
        for copies in self.sets:
            copies.wait()

    def _free(self) -> None:
        for copies in self.sets:
            copies.free()


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
