"""Experts that see every token, and how they join the routed ones.

Shapes: T tokens, D model.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SharedGate(nn.Module):
    """routed + sigmoid(w x) shared, or c_0 routed + c_1 shared with c = softmax(W x).

    Sources: Qwen2-MoE (2407.10671) for the first; the residual MoE of DeepSpeed-MoE (2201.05596, sec. 4.1), whose dense
    branch is a shared expert here, for the second. Weights are fp32.
    """

    def __init__(self, d_model: int, kind: Literal["sigmoid", "softmax"]) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(1 if kind == "sigmoid" else 2, d_model))

    def forward(self, x_TD: Tensor, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            scores = F.linear(x_TD.float(), self.weight.float())
        if self.kind == "sigmoid":
            return routed_TD + scores.sigmoid().to(shared_TD.dtype) * shared_TD
        weights_T2 = scores.softmax(dim=-1).to(shared_TD.dtype)
        return weights_T2[:, :1] * routed_TD + weights_T2[:, 1:] * shared_TD
