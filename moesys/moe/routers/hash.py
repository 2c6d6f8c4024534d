"""Experts by token id, without anything learned.

Shapes: T tokens, D model, E experts, K experts per token.
"""

import math

import torch
from torch import Tensor, nn

from moesys.moe.routing import RoutingResult
from moesys.moe.tokens import Tokens


class HashRouter(nn.Module):
    """A token's experts are a random function of its vocabulary id, another one in every layer and for every seed.

    Source: Hash Layers (2106.04426, sec. 3.1, random hash; its multi-hash for K above 1). Weights are 1 / K.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_experts: int,
        top_k: int,
        layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.layer = layer
        self.seed = seed

    def forward(
        self, x_TD: Tensor, state: Tensor | None = None, tokens: Tokens | None = None
    ) -> RoutingResult:
        """No host sync."""
        if tokens is None or tokens.ids_T is None:
            raise ValueError(f"{type(self).__name__} routes by token id: call the layer with ids")
        key = (self.seed * 1_000_003 + self.layer) & 0xFFFFFFFF
        first_T = _mixed(tokens.ids_T ^ _mixed(torch.tensor(key, device=x_TD.device)))
        # Distinct: from the first in strides that have no divisor in common with E.
        strides = torch.tensor(_coprimes(self.num_experts), device=x_TD.device)
        stride_T = strides[_mixed(first_T + 1) % len(strides)]
        slots_K = torch.arange(self.top_k, device=x_TD.device)
        ids_TK = (first_T[:, None] + stride_T[:, None] * slots_K) % self.num_experts
        even_TE = x_TD.new_full((len(ids_TK), self.num_experts), 1 / self.num_experts).float()
        return RoutingResult(
            topk_ids_TK=ids_TK,
            topk_weights_TK=torch.full_like(ids_TK, 1 / self.top_k, dtype=torch.float32),
            logits_TE=torch.zeros_like(even_TE),
            probs_TE=even_TE,
        )


def _mixed(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers, int64 in and out (C. Wellons' lowbias32); a product's high bits do not count."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _coprimes(n: int) -> list[int]:
    return [k for k in range(1, max(2, n)) if math.gcd(k, n) == 1]
