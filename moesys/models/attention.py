"""Causal grouped-query attention (2305.13245) through torch's scaled_dot_product_attention.

Shapes: B sequences, S positions, T = B * S tokens, D model, N query heads, M key/value heads, H head dim.
"""

from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.models.attention_experts import AttentionGate
from moesys.models.linear import Linear
from moesys.models.norm import RMSNorm
from moesys.models.rope import apply_rope
from moesys.ops.autocast import compute_type
from moesys.ops.projection import Projection, project
from moesys.ops.shard import local_tensor
from moesys.parallel.context import DocumentEnds, check_documents
from moesys.plan.batch.local import LocalPieces

Within = DocumentEnds | LocalPieces
"""What a token sees no further than: its document, in samples of equal length, or its sequence, of which a rank may have a piece."""


class AttentionCore(Protocol):
    """softmax(q k^T / sqrt(H)) v over the positions that a query may see."""

    def __call__(self, q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, within: Any, /) -> Tensor:
        """Return [B, N, S, H]. `within`: None or, of the kind that the core is for, `Within`."""
        ...


def causal_attention(
    q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, ends: DocumentEnds | None = None
) -> Tensor:
    """Each position sees itself and those before it, in its own document if `ends` are given (one call for each)."""
    if ends is None:
        return F.scaled_dot_product_attention(
            q_BNSH, k_BMSH, v_BMSH, is_causal=True, enable_gqa=q_BNSH.shape[1] != k_BMSH.shape[1]
        )
    check_documents(ends, q_BNSH.shape[0], q_BNSH.shape[2])
    samples = []
    for sample, sample_ends in enumerate(ends):
        lengths = [end - begin for begin, end in pairwise((0, *sample_ends))]
        pieces = [x[sample : sample + 1].split(lengths, dim=2) for x in (q_BNSH, k_BMSH, v_BMSH)]
        samples.append(torch.cat([causal_attention(*qkv) for qkv in zip(*pieces, strict=True)], 2))
    return torch.cat(samples)


class Attention(nn.Module):
    """Built for one rank; `parallelize` cuts the matrices by heads, and swaps the projection and the core."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        head_dim = config.resolved_head_dim
        self.head_dim = head_dim
        self.wq = Linear(config.d_model, config.total_heads * head_dim)
        self.wk = Linear(config.d_model, config.total_kv_heads * head_dim)
        self.wv = Linear(config.d_model, config.total_kv_heads * head_dim)
        self.wo = Linear(config.total_heads * head_dim, config.d_model)
        self.gate = AttentionGate(config) if config.attention_experts > 1 else None
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else None
        self.project: Projection = project
        self.core: AttentionCore = causal_attention

    def forward(
        self, x_TD: Tensor, rope_SH: tuple[Tensor, Tensor], within: Within | None = None
    ) -> Tensor:
        """Sequences one after the other, each of as many positions as the rotary tables, to [T, D]."""
        matrices = (local_tensor(w.weight) for w in (self.wq, self.wk, self.wv))
        q_TO, k_TO, v_TO = self.project(compute_type(x_TD), *matrices)
        out_BNSH = self.core(*self.heads(q_TO, k_TO, v_TO, rope_SH), within)
        out_TO = out_BNSH.transpose(1, 2).flatten(2).flatten(0, 1)
        return self.wo(out_TO if self.gate is None else self.gate(x_TD, out_TO))

    def heads(
        self, q_TO: Tensor, k_TO: Tensor, v_TO: Tensor, rope_SH: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cut into sequences and heads: [B, N or M, S, H] of each. Norm q and k, turn them by position."""
        seq_len = rope_SH[0].shape[0]
        # One sample without tokens still receives others' keys, to pass them on.
        shape = (q_TO.shape[0] // seq_len if seq_len else 1), seq_len
        q, k, v = (
            y_TO.unflatten(-1, (-1, self.head_dim)).unflatten(0, shape)
            for y_TO in (q_TO, k_TO, v_TO)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y_BSNH.transpose(1, 2) for y_BSNH in (q, k, v))
        return apply_rope(q, rope_SH), apply_rope(k, rope_SH), v
