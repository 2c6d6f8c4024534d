"""SwiGLU feed-forwards: one, or many side by side.

Shapes: T tokens, D model, F hidden, L local experts, R rows in order of local expert.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.ops import swiglu
from moesys.ops.autocast import compute_type
from moesys.ops.grouped_linear import GroupedBackend, grouped_linear
from moesys.ops.projection import Projection, project
from moesys.ops.shard import local_tensor


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (2002.05202). gate and up are one parameter [2, F, D], so one product."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, d_hidden, d_model))
        self.down = nn.Parameter(torch.empty(d_model, d_hidden))
        self.project: Projection = project

    def forward(self, x_TD: Tensor) -> Tensor:
        """x_TD, or a rank's part of it where `project` brings the rest."""
        (hidden_T2F,) = self.project(compute_type(x_TD), local_tensor(self.gate_up).flatten(0, 1))
        return F.linear(swiglu(hidden_T2F), compute_type(local_tensor(self.down)))


class Experts(nn.Module):
    """L SwiGLU experts of one width over rows grouped by expert. Sharded over ep, the parameters are DTensors on dim 0."""

    def __init__(self, num_experts: int, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2, d_expert, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_expert))
        self.backend: GroupedBackend = "grouped_mm"

    def forward(self, rows_RD: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
        """Return [R, D]; rows past tokens_per_expert_L.sum() are undefined."""
        gate_up, down = local_tensor(self.gate_up), local_tensor(self.down)
        return grouped_swiglu(rows_RD, gate_up, down, tokens_per_expert_L, self.backend)

    def classes(self) -> list["Experts"]:
        """This one."""
        return [self]


def grouped_swiglu(
    rows_RD: Tensor, gate_up: Tensor, down: Tensor, counts_L: Tensor, backend: GroupedBackend
) -> Tensor:
    """[R, D] of experts gate_up [L, 2, F, D] and down [L, D, F], each with so many rows in their order."""
    hidden_R2F = grouped_linear(rows_RD, gate_up.flatten(1, 2), counts_L, backend)
    return grouped_linear(swiglu(hidden_R2F), down, counts_L, backend)


class ExpertClasses(nn.Module):
    """L SwiGLU experts of several widths (HMoE, 2408.10681): equal classes, class by class, each computed as one."""

    def __init__(self, num_experts: int, d_model: int, widths: Sequence[int]) -> None:
        super().__init__()
        for index, width in enumerate(widths):
            self.add_module(str(index), Experts(num_experts // len(widths), d_model, width))

    def forward(
        self, rows_RD: Tensor, tokens_per_expert_L: Tensor, rows_per_class_list: list[int]
    ) -> Tensor:
        """Return [R, D]; `rows_per_class_list` sums to R."""
        classes = self.classes()
        parts = zip(
            classes,
            rows_RD.split(rows_per_class_list),
            tokens_per_expert_L.chunk(len(classes)),
            strict=True,
        )
        return torch.cat([experts(rows_RD, counts_L) for experts, rows_RD, counts_L in parts])

    def classes(self) -> list[Experts]:
        """Of each width."""
        return [module for module in self.children() if isinstance(module, Experts)]
