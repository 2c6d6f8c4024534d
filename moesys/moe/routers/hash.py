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
        self.key = mixed_int((seed * 1_000_003 + layer) & 0xFFFFFFFF)
        # No buffers: those begin at zero. A token's experts lie in strides that have no divisor in common with E.
        strides = [k for k in range(1, max(2, num_experts)) if math.gcd(k, num_experts) == 1]
        self.strides = torch.tensor(strides, device="cpu")

    def forward(
        self, x_TD: Tensor, state: Tensor | None = None, tokens: Tokens | None = None
    ) -> RoutingResult:
        """No host sync after the first."""
        if tokens is None or tokens.ids_T is None:
            raise ValueError(f"{type(self).__name__} routes by token id: call the layer with ids")
        self.strides = self.strides.to(x_TD.device)
        first_T = mixed(tokens.ids_T ^ self.key)
        stride_T = self.strides[mixed(first_T + 1) % len(self.strides)]
        slots_K = torch.arange(self.top_k, device=x_TD.device)
        ids_TK = (first_T[:, None] + stride_T[:, None] * slots_K) % self.num_experts
        even_TE = x_TD.new_full((len(ids_TK), self.num_experts), 1 / self.num_experts).float()
        return RoutingResult(
            topk_ids_TK=ids_TK,
            topk_weights_TK=torch.full_like(ids_TK, 1 / self.top_k, dtype=torch.float32),
            logits_TE=torch.zeros_like(even_TE),
            probs_TE=even_TE,
        )


def mixed(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers, int64 in and out (C. Wellons' lowbias32); a product's high bits do not count."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def mixed_int(x: int) -> int:
    """The same of one number."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
