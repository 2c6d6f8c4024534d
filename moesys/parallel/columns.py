"""How tokens and results move between ranks that share out the columns of a table which each token reads rows of.

Every rank looks up the rows of all ranks' tokens, and has a part of each row. Shapes: T tokens on this rank, U = P * T
tokens of the P ranks, W columns, w = W / P of them on this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel.tensor import TensorParallel


class ColumnParallel:
    """The moves of one group; all are collectives, and differentiable where x has a gradient. Ranks have equal T."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self._tokens = TensorParallel(group)

    def all_tokens(self, x: Tensor) -> Tensor:
        """[U, ...] from each rank's [T, ...]."""
        return self._tokens.gather(x)

    def own_tokens(self, partial: Tensor) -> Tensor:
        """[T, ...] of the sum of the ranks' [U, ...]."""
        return self._tokens.leave(partial)

    def to_columns(self, x_TW: Tensor) -> Tensor:
        """[T, ..., W] of this rank's tokens to [U, ..., w] of all tokens. An all-to-all."""
        return _ToColumns.apply(x_TW, self)

    def from_columns(self, x_Uw: Tensor) -> Tensor:
        """[U, ..., w] of all tokens to [T, ..., W] of this rank's: the inverse."""
        return _FromColumns.apply(x_Uw, self)

    def _spread(self, x_TW: Tensor) -> Tensor:
        return self._exchange(torch.stack(x_TW.chunk(self.size, dim=-1))).flatten(0, 1)

    def _collect(self, x_Uw: Tensor) -> Tensor:
        return torch.cat([*self._exchange(x_Uw.unflatten(0, (self.size, -1)))], dim=-1)

    def _exchange(self, x: Tensor) -> Tensor:
        """The p-th part of dim 0 to rank p."""
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.group)
        return received


class _ToColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TW: Tensor, columns: ColumnParallel) -> Tensor:
        ctx.columns = columns
        return columns._spread(x_TW)

    @staticmethod
    def backward(ctx, grad_Uw: Tensor):  # type: ignore[override]
        return ctx.columns._collect(grad_Uw), None


class _FromColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_Uw: Tensor, columns: ColumnParallel) -> Tensor:
        ctx.columns = columns
        return columns._collect(x_Uw)

    @staticmethod
    def backward(ctx, grad_TW: Tensor):  # type: ignore[override]
        return ctx.columns._spread(grad_TW), None
