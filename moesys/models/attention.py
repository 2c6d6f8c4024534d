"""Causal grouped-query attention (2305.13245) through torch's scaled_dot_product_attention.

Shapes: B sequences, S positions, T = B * S tokens, D model, N query heads, M key/value heads, H head dim.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.models.linear import Linear
from moesys.models.norm import RMSNorm
from moesys.models.rope import apply_rope


class AttentionCore(Protocol):
    """softmax(q k^T / sqrt(H)) v over the positions that a query may see."""

    def __call__(self, q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor) -> Tensor:
        """Return [B, N, S, H]."""
        ...


def causal_attention(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor) -> Tensor:
    """Each position sees itself and those before it."""
    return F.scaled_dot_product_attention(
        q_BNSH, k_BMSH, v_BMSH, is_causal=True, enable_gqa=q_BNSH.shape[1] != k_BMSH.shape[1]
    )


class Attention(nn.Module):
    """Built for one rank; `parallelize` cuts the matrices by heads and swaps the core."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        head_dim = config.resolved_head_dim
        self.head_dim = head_dim
        self.wq = Linear(config.d_model, config.num_heads * head_dim)
        self.wk = Linear(config.d_model, config.num_kv_heads * head_dim)
        self.wv = Linear(config.d_model, config.num_kv_heads * head_dim)
        self.wo = Linear(config.num_heads * head_dim, config.d_model)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.core: AttentionCore = causal_attention

    def forward(self, x_TD: Tensor, rope_SH: tuple[Tensor, Tensor]) -> Tensor:
        """Whole sequences, one after the other, to [T, D]."""
        seq_len = rope_SH[0].shape[0]
        q_BSNH, k_BSMH, v_BSMH = (
            w(x_TD).unflatten(-1, (-1, self.head_dim)).unflatten(0, (-1, seq_len))
            for w in (self.wq, self.wk, self.wv)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSNH = self.q_norm(q_BSNH).to(v_BSMH.dtype)
            k_BSMH = self.k_norm(k_BSMH).to(v_BSMH.dtype)
        q_BNSH = apply_rope(q_BSNH.transpose(1, 2), rope_SH)
        k_BMSH = apply_rope(k_BSMH.transpose(1, 2), rope_SH)
        out_BNSH = self.core(q_BNSH, k_BMSH, v_BSMH.transpose(1, 2))
        return self.wo(out_BNSH.transpose(1, 2).flatten(2).flatten(0, 1))
