"""Cosine similarity in a low-rank space.

Shapes: T tokens, D model, E experts, P projected width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.moe.routers.topk import TopKRouter


class CosineRouter(TopKRouter):
    """logits_i = cos(P x, e_i) / tau, with a learned temperature tau that starts at `temperature`.

    Source: X-MoE (2204.09179, sec. 4.2), where the projected width is E / 2 and tau starts at 0.07. Directions alone
    count, so that no expert draws the tokens to itself by the length of its embedding.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_experts: int,
        projected_width: int | None = None,
        temperature: float = 0.07,
        **options: Any,
    ) -> None:
        super().__init__(d_model=d_model, num_experts=num_experts, **options)
        width = max(1, num_experts // 2) if projected_width is None else projected_width
        if not 1 <= width <= d_model:
            raise ValueError(
                f"router option projected_width={width} must be in 1..model.d_model={d_model}"
            )
        if not temperature > 0:
            raise ValueError(f"router option temperature={temperature} must be above 0")
        self.temperature = temperature
        self.projection = nn.Parameter(torch.empty(width, d_model))
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.log_scale = nn.Parameter(torch.zeros(1))
        """tau = temperature * exp(-log_scale), kept between a hundredth and 1."""

    def logits(self, x_TD: Tensor) -> Tensor:
        projected_TP = F.normalize(F.linear(x_TD, self.projection.float()), dim=-1)
        cosine_TE = F.linear(projected_TP, F.normalize(self.weight.float(), dim=-1))
        log_scale = self.log_scale.float() - math.log(self.temperature)
        return cosine_TE * log_scale.clamp(0.0, math.log(100.0)).exp()
