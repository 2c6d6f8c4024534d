"""Routers that explore: random in training, plain top-k in evaluation.

Shapes: T tokens, D model, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.moe.routers.topk import TopKRouter


class NoisyTopKRouter(TopKRouter):
    """logits = W x + N(0, 1) * softplus(W_noise x), each expert's noise of a width that is learned.

    Source: Shazeer et al. (1701.06538, eq. 4), the GShard gate of FSMoE (2501.10714, sec. 3.1).
    """

    def __init__(self, *, d_model: int, num_experts: int, **options: Any) -> None:
        super().__init__(d_model=d_model, num_experts=num_experts, **options)
        self.noise_weight = nn.Parameter(torch.empty(num_experts, d_model))

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().logits(x_TD)
        if not self.training:
            return logits_TE
        width_TE = F.softplus(F.linear(x_TD, self.noise_weight.float()))
        return logits_TE + torch.randn_like(logits_TE) * width_TE


class SwitchRouter(TopKRouter):
    """One expert per token, weighted by its softmax score; in training the router sees x * U(1 - jitter, 1 + jitter).

    Source: Switch Transformers (2101.03961, sec. 2.2 and 2.4). Its capacity keeps the first tokens; `capacity_priority:
    random` is the random token selection of Z-code M3 (2109.10465).
    """

    def __init__(self, *, top_k: int, jitter: float = 0.01, **options: Any) -> None:
        super().__init__(top_k=top_k, normalize_weights=False, **options)
        if top_k != 1:
            raise ValueError(f"{type(self).__name__} needs model.moe.top_k=1, not {top_k}")
        if not 0 <= jitter < 1:
            raise ValueError(f"router option jitter={jitter} must be at least 0 and below 1")
        self.jitter = jitter

    def logits(self, x_TD: Tensor) -> Tensor:
        if self.training and self.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        return super().logits(x_TD)
