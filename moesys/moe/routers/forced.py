"""Routing by decree, to measure a layer at a known load. Not for training.

The weights are those that the learned scores give to the experts decreed, so that a step costs what it does with
TopKRouter and gradients flow. Shapes: T tokens, E experts, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor

from moesys.moe.routers.topk import TopKRouter


class RoundRobinRouter(TopKRouter):
    """Token t takes experts t * K .. t * K + K - 1 modulo E: the load is as even as it can be."""

    def select(self, scores_TE: Tensor) -> Tensor:
        num_tokens, num_experts = scores_TE.shape
        slots_TK = torch.arange(num_tokens * self.top_k, device=scores_TE.device)
        return slots_TK.view(num_tokens, self.top_k) % num_experts


class ZipfRouter(TopKRouter):
    """Experts drawn without replacement, expert i with a probability that falls as 1 / (i + 1)^exponent.

    0 is an even draw, 1 a strong skew.
    """

    def __init__(self, *, exponent: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        if not exponent >= 0:
            raise ValueError(f"router option exponent={exponent} must be at least 0")
        self.exponent = exponent

    def select(self, scores_TE: Tensor) -> Tensor:
        places_E = torch.arange(1, scores_TE.shape[1] + 1, device=scores_TE.device)
        noise_TE = (
            -torch.empty_like(scores_TE).exponential_().log()
        )  # Gumbel: top-k of it is a draw
        return (noise_TE - self.exponent * places_E.log()).topk(self.top_k, dim=-1)[1]
