"""Experts without a feed-forward, which cost no row that travels.

Shapes: T tokens, D model, K slots per token, C constant experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.config.schema import MoEConfig
from moesys.ops.autocast import compute_type


class NullExperts(nn.Module):
    """zero: nothing; copy: x; constant: a_0 x + a_1 v, a = softmax(W x), with v and W of its own.

    Their ids follow those of the routed experts, in this order. Source: MoE++ (2410.07348, sec. 3.1): easy tokens take
    fewer feed-forwards. A balance loss counts them as experts like the others.
    """

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.first_copy = config.num_experts + config.zero_experts
        self.first_constant = self.first_copy + config.copy_experts
        number = config.constant_experts
        self.constant = nn.Parameter(torch.empty(number, d_model)) if number else None
        self.mix = nn.Parameter(torch.empty(number, 2, d_model)) if number else None

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D], the sum over a token's slots that are theirs. No host sync."""
        is_copy_TK = (ids_TK >= self.first_copy) & (ids_TK < self.first_constant)
        of_x_T1 = (weights_TK * is_copy_TK).sum(dim=1, keepdim=True)
        if self.constant is None or self.mix is None:
            return of_x_T1.to(x_TD.dtype) * x_TD
        numbers_C = torch.arange(len(self.constant), device=ids_TK.device) + self.first_constant
        of_each_TC = (weights_TK[:, :, None] * (ids_TK[:, :, None] == numbers_C)).sum(dim=1)
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_T2C = F.linear(x_TD.float(), self.mix.float().flatten(0, 1))
            shares_TC2 = scores_T2C.unflatten(1, (-1, 2)).softmax(dim=-1) * of_each_TC[:, :, None]
        of_x_T1 = of_x_T1 + shares_TC2[:, :, 0].sum(dim=1, keepdim=True)
        of_v_TC = shares_TC2[:, :, 1].to(x_TD.dtype)
        return of_x_T1.to(x_TD.dtype) * x_TD + of_v_TC @ compute_type(self.constant)
