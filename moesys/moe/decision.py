"""What one forward of an MoE layer decides, and how a recomputation comes by it without deciding again.

Shapes: T tokens on this rank, D model, E experts, K experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moesys.moe.balance import RoutingLosses
from moesys.moe.codec import Code
from moesys.moe.routing import Blend


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which rows go where, with what weight; the rest of the layer only computes."""

    weights_TK: Tensor
    """fp32, differentiable; 0 where a slot has no expert."""
    plan: Any
    """The dispatcher's: integers only."""
    losses: RoutingLosses
    state: Tensor | None
    """The router's, for the next layer."""
    blend: Blend | None = None
    """How tokens become rows, where these are no tokens."""
    code: Code | None = None
    """Where fewer rows travel than there are slots."""
    null_ids_TK: Tensor | None = None
    """int64, where slots may be of experts without a feed-forward: all slots' ids."""

    def detached(self) -> "Decision":
        """The same numbers outside of the graph that made them."""
        state = None if self.state is None else _detached(self.state)
        return replace(
            self,
            weights_TK=_detached(self.weights_TK),
            losses=RoutingLosses(*map(_detached, self.losses)),
            state=state,
            blend=None if self.blend is None else self.blend.detached(),
        )


@dataclass
class _Page:
    """The decision of one forward, once it is made."""

    decision: Decision | None = None


class DecisionMemory:
    """Lets the recomputation of a forward recall what the forward decided.

    What the router saves for backward is kept, but for its input, the layer's x_TD: the recomputation brings that
    back. So a router runs once per forward whatever it does: draw noise, count, talk to other ranks.
    """

    def __init__(self) -> None:
        self._page: _Page | None = None

    def passes(self) -> tuple["_Open", "_Open"]:
        """The contexts of a forward and of its recomputations, as torch.utils.checkpoint's context_fn gives them."""
        page = _Page()
        return _Open(self, page), _Open(self, page)

    def recall(self, decide: Callable[[Tensor], Decision], x_TD: Tensor) -> Decision:
        """`decide(x_TD)`, or what it gave in the forward that is being recomputed."""
        page = self._page
        if page is None:
            return decide(x_TD)
        held_TD = _Hold.apply(x_TD)
        if page.decision is not None:
            return page.decision
        with _kept_but_for(held_TD):
            decision = decide(held_TD)
        page.decision = decision.detached()
        return decision

    def swap(self, page: _Page | None) -> _Page | None:
        """Open a page; return the one that was open."""
        before, self._page = self._page, page
        return before


@dataclass
class _Open:
    """A context in which the memory's page is open; may be entered again and again."""

    memory: DecisionMemory
    page: _Page
    before: list[_Page | None] = field(default_factory=list)

    def __enter__(self) -> None:
        self.before.append(self.memory.swap(self.page))

    def __exit__(self, *_: object) -> None:
        self.memory.swap(self.before.pop())


class _Hold(torch.autograd.Function):
    """The identity; its node saves x, as the checkpoint around it wants that saved."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad


@contextmanager
def _kept_but_for(held: Tensor) -> Iterator[None]:
    """Within, saved tensors are kept past a checkpoint around; `held`, an output of _Hold, is taken from its node."""
    node: Any = held.grad_fn
    place = _place(held)
    taken: list[Tensor] = []  # a checkpoint gives a tensor back once

    def pack(tensor: Tensor) -> Tensor | None:
        # Detached: a node that held its own output would keep itself alive.
        return None if node is not None and _place(tensor) == place else tensor.detach()

    def unpack(packed: Tensor | None) -> Tensor:
        if packed is not None:
            return packed
        if not taken:
            taken.extend(node.saved_tensors)
        return taken[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype


def _detached(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)
