"""How tokens move between the ranks that share each dense matrix (tensor parallelism, 1909.08053; with the
tokens between matrices spread over the ranks too, sequence parallelism, 2205.05198).

Before a matrix that is cut along its outputs every rank needs all tokens; after one that is cut along its inputs
every rank has a part of every token's sum. Tokens are the flattened first dim, so any T divisible by the ranks does.

    enter, leave      of a region of cut matrices: gather and reduce-scatter with sequence parallelism,
                      identity and all-reduce without; each is the other's backward
    split, join       without sequence parallelism: to a region that works on a share of the tokens, and back

Shapes: T tokens of the group, t = T / size tokens of this rank, D model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Torch 2.13 has new names for the two.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass
class TrafficMeter:
    """Exact bytes that this rank sent to others since the last `read`."""

    sent_bytes: int = 0

    def read(self) -> int:
        sent, self.sent_bytes = self.sent_bytes, 0
        return sent


class TensorParallel:
    """The moves of one tensor-parallel group; all are collectives and differentiable."""

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool = True) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sequence_parallel = sequence_parallel

    def enter(self, x: Tensor) -> Tensor:
        """Give every rank all tokens: [t, D] (or [T, D] without sequence parallelism) to [T, D]."""
        if self.sequence_parallel:
            return _Move.apply(x, self._gather, self._reduce_scatter)
        return _Move.apply(x, _identity, self._all_reduce)

    def leave(self, partial: Tensor) -> Tensor:
        """Sum the ranks' parts [T, D]; each keeps its t tokens (or all T without sequence parallelism)."""
        if self.sequence_parallel:
            return _Move.apply(partial, self._reduce_scatter, self._gather)
        return _Move.apply(partial, self._all_reduce, _identity)

    def split(self, x: Tensor) -> Tensor:
        """[T, D], the same on all ranks, to this rank's [t, D]."""
        return _Move.apply(x, self._own, self._gather)

    def join(self, x: Tensor) -> Tensor:
        """[t, D] to [T, D], the same on all ranks."""
        return _Move.apply(x, self._gather, self._own)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of a tensor that each rank goes on to use alike; not differentiable."""
        return self._all_reduce(x)

    def max(self, x: Tensor) -> Tensor:
        """The maximum over ranks; not differentiable."""
        return self._all_reduce(x, dist.ReduceOp.MAX)

    def _own(self, x: Tensor) -> Tensor:
        # A copy: a view would keep all of x for backward.
        return x.chunk(self.size)[self.rank].clone()

    def _gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        all_gather_single(out, x, group=self.group)
        return out

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        reduce_scatter_single(out, x, group=self.group)
        return out

    def _all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        out = x.contiguous().clone()
        dist.all_reduce(out, op=op, group=self.group)
        return out


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return ctx.back(grad), None, None


def _identity(x: Tensor) -> Tensor:
    return x.view_as(x)
