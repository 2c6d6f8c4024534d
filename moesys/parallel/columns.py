"""How tokens and results move between ranks that share out the columns of a table which each token reads rows of.

Every rank looks up the rows of all ranks' tokens, and has a part of each row. Shapes: T tokens on this rank, U = P * T
tokens of the P ranks, W columns, w = W / P of them on this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel.exchange import swap
from moesys.parallel.tensor import TensorParallel
from moesys.plan.batch.local import LocalPieces


class ColumnParallel:
    """The moves of one group; all are collectives, and differentiable where x has a gradient. Ranks have equal T."""

    def __init__(self, group: dist.ProcessGroup, tp_size: int = 1) -> None:
        """`tp_size` ranks each have an equal run of a data rank's rows."""
        self.group, self.tp_size = group, tp_size
        self.size = dist.get_world_size(group)
        self._tokens = TensorParallel(group)

    def num_rows(self, own: int, pieces: LocalPieces | None) -> int:
        """To which each rank fills up its own tokens."""
        return own if pieces is None else pieces.most_rows // self.tp_size

    def all_tokens(self, x: Tensor) -> Tensor:
        """[U, ...] from each rank's [T, ...]."""
        return self._tokens.gather(x)

    def own_tokens(self, partial: Tensor) -> Tensor:
        """[T, ...] of the sum of the ranks' [U, ...]."""
        return self._tokens.leave(partial)

    def to_columns(self, x_TW: Tensor) -> Tensor:
        """[T, ..., W] of this rank's tokens to [U, ..., w] of all tokens."""
        return swap(torch.stack(x_TW.chunk(self.size, dim=-1)), self.group).flatten(0, 1)

    def from_columns(self, x_Uw: Tensor) -> Tensor:
        """[U, ..., w] of all tokens to [T, ..., W] of this rank's: the inverse."""
        return torch.cat([*swap(x_Uw.unflatten(0, (self.size, -1)), self.group)], dim=-1)
