"""SwiGLU feed-forwards: one, or many side by side.

Shapes: T tokens, D model, F hidden, L local experts, R rows in order of local expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.ops import swiglu
from moesys.ops.grouped_linear import GroupedBackend, grouped_linear
from moesys.ops.shard import local_tensor


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (2002.05202). gate and up are one parameter [2, F, D], so one product."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, d_hidden, d_model))
        self.down = nn.Parameter(torch.empty(d_model, d_hidden))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D], any leading shape."""
        hidden_TF = swiglu(F.linear(x.flatten(0, -2), local_tensor(self.gate_up).flatten(0, 1)))
        return F.linear(hidden_TF, local_tensor(self.down)).view_as(x)


class Experts(nn.Module):
    """L SwiGLU experts over rows grouped by expert. Sharded over ep, the parameters are DTensors on dim 0."""

    def __init__(self, num_experts: int, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2, d_expert, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_expert))
        self.backend: GroupedBackend = "grouped_mm"

    def forward(self, rows_RD: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
        """Return [R, D]; rows past tokens_per_expert_L.sum() are undefined."""
        gate_up, down = local_tensor(self.gate_up), local_tensor(self.down)
        hidden_R2F = grouped_linear(
            rows_RD, gate_up.flatten(1, 2), tokens_per_expert_L, self.backend
        )
        return grouped_linear(swiglu(hidden_R2F), down, tokens_per_expert_L, self.backend)
