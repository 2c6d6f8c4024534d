"""Experts of which this rank is the owner, and copies of other ranks' for a while.

Shapes: D model, F hidden, O own experts, L of these and all copies, R rows in order of them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesys.moe.experts import grouped_swiglu
from moesys.moe.layer_copies import LayerCopies, entered, left
from moesys.ops.grouped_linear import GroupedBackend
from moesys.ops.shard import local_tensor, set_rows

Timed = Callable[[int], AbstractContextManager[None]]
"""Within, so many rows are computed."""


def untimed(num_rows: int) -> AbstractContextManager[None]:
    """Nobody asks."""
    return nullcontext()


class HeldExperts(nn.Module):
    """As `Experts`, of any number of a layer's experts; and between a gather and a reduction, copies of others."""

    def __init__(self, gate_up: nn.Parameter, down: nn.Parameter, owned: Sequence[int]) -> None:
        """[O, 2, F, D] and [O, D, F], or DTensors with these as their local parts. `owned`: which experts, ascending."""
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.owned = tuple(owned)
        self.backend: GroupedBackend = "grouped_mm"
        self.timed: Timed = untimed
        """Products of a training forward, alone."""
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
        copies: LayerCopies,
    ) -> Tensor:
        """Return [R, D]; `rows_list` are those for own experts and those for each set of copies."""
        rows_RD = entered(rows_RD, copies)
        gate_up, down = local_tensor(self.gate_up), local_tensor(self.down)
        parts = zip(
            ((gate_up, down), *copies.parameters()),
            rows_RD.split(list(rows_list)),
            tokens_per_expert_L.split(copies.held),
            strict=True,
        )
        with (self.timed if self.training else untimed)(len(rows_RD)):
            out = [
                grouped_swiglu(rows_RD, gate_up, down, counts_L, self.backend)
                for (gate_up, down), rows_RD, counts_L in parts
                if len(counts_L)
            ]
        return left(torch.cat(out) if out else rows_RD, copies)
