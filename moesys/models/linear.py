"""torch's linear map and embedding over this rank's shard of their parameter."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from moesys.ops.projection import Projection, project
from moesys.ops.shard import local_tensor


class Linear(nn.Linear):
    """y = W x without a bias; of a W cut along its outputs the rank's outputs, along its inputs a partial sum."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)
        self.project: Projection = project

    def forward(self, input: Tensor) -> Tensor:
        """x [..., d_in]."""
        return self.project(input, local_tensor(self.weight))[0]


class Embedding(nn.Embedding):
    """Rows of a table by token id; `parallelize` swaps the lookup where ranks share the table out."""

    def __init__(self, num_rows: int, d_model: int) -> None:
        super().__init__(num_rows, d_model)
        self.lookup: Callable[[Tensor, Tensor], Tensor] = F.embedding

    def forward(self, input: Tensor) -> Tensor:
        """ids [T] to [T, D]."""
        return self.lookup(input, local_tensor(self.weight))
