"""Causal grouped-query attention (2305.13245) through torch's scaled_dot_product_attention.

Shapes: B sequences, S positions, D model, N query heads, M key/value heads, H head dim.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.models.norm import RMSNorm
from moesys.models.rope import apply_rope


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        head_dim = config.resolved_head_dim
        self.head_dim = head_dim
        self.wq = nn.Linear(config.d_model, config.num_heads * head_dim, bias=False)
        self.wk = nn.Linear(config.d_model, config.num_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(config.d_model, config.num_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * head_dim, config.d_model, bias=False)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, rope_SH: tuple[Tensor, Tensor]) -> Tensor:
        q_BSNH, k_BSMH, v_BSMH = (
            w(x_BSD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSNH = self.q_norm(q_BSNH).to(v_BSMH.dtype)
            k_BSMH = self.k_norm(k_BSMH).to(v_BSMH.dtype)
        q_BNSH = apply_rope(q_BSNH.transpose(1, 2), rope_SH)
        k_BMSH = apply_rope(k_BSMH.transpose(1, 2), rope_SH)
        out_BNSH = F.scaled_dot_product_attention(
            q_BNSH,
            k_BMSH,
            v_BSMH.transpose(1, 2),
            is_causal=True,
            enable_gqa=q_BNSH.shape[1] != k_BMSH.shape[1],
        )
        return self.wo(out_BNSH.transpose(1, 2).flatten(2))
