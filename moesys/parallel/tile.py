"""softmax(q k^T / sqrt(H)) v over one tile of keys, in a form that sums up over tiles, and its gradient.

A tile's output is normalised by the tile's own log-sum-exp; two tiles of the same queries are merged by weighting
each with its share of the sum of both (2205.14135, section 3.1). The gradient of a tile needs the output and the
log-sum-exp over *all* tiles, and then sums up too. Torch's flash kernels work so; the reference spells it out.

Shapes: B samples, N query heads, M key/value heads (N a multiple of M), Q queries, K keys, H head dim.
"""

import torch
from torch import Tensor

from moesys.parallel.context import DocumentEnds

_aten = torch.ops.aten


def attend(
    q_BNQH: Tensor, k_BMKH: Tensor, v_BMKH: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the output [B, N, Q, H] in q's dtype and its log-sum-exp [B, N, Q] in at least fp32.

    With `is_causal`, Q equals K and query i sees keys 0..i.
    """
    match _kernel(q_BNQH):
        case "cpu":
            return _aten._scaled_dot_product_flash_attention_for_cpu(
                q_BNQH, k_BMKH, v_BMKH, 0.0, is_causal
            )
        case "cuda":
            return _aten._scaled_dot_product_flash_attention(
                q_BNQH, k_BMKH, v_BMKH, 0.0, is_causal
            )[:2]
    return reference_attend(q_BNQH, k_BMKH, v_BMKH, is_causal)


def attend_backward(
    grad_BNQH: Tensor,
    q_BNQH: Tensor,
    k_BMKH: Tensor,
    v_BMKH: Tensor,
    out_BNQH: Tensor,
    lse_BNQ: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from this tile; `out_BNQH` and `lse_BNQ` are those over all tiles."""
    saved = (grad_BNQH, q_BNQH, k_BMKH, v_BMKH, out_BNQH, lse_BNQ)
    match _kernel(q_BNQH):
        case "cpu":
            return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *saved, 0.0, is_causal
            )
        case "cuda":
            # The kernel reads these two as dense arrays, and random numbers only with dropout.
            saved = (*saved[:4], out_BNQH.contiguous(), lse_BNQ.contiguous())
            seed, offset = (
                torch.zeros(n, dtype=torch.uint64, device=q_BNQH.device) for n in (2, 1)
            )
            lengths = (None, None, q_BNQH.shape[2], k_BMKH.shape[2])
            return _aten._scaled_dot_product_flash_attention_backward(
                *saved, *lengths, 0.0, is_causal, seed, offset
            )
    return reference_attend_backward(*saved, is_causal)


def merge_(out_BNQH: Tensor, lse_BNQ: Tensor, tile_out_BNQH: Tensor, tile_lse_BNQ: Tensor) -> None:
    """Take one more tile into `out_BNQH` and `lse_BNQ`, in their dtype; they begin as 0 and -inf."""
    merged_lse_BNQ = torch.logaddexp(lse_BNQ, tile_lse_BNQ)
    out_BNQH *= (lse_BNQ - merged_lse_BNQ).exp().unsqueeze(-1)
    out_BNQH += tile_out_BNQH * (tile_lse_BNQ - merged_lse_BNQ).exp().unsqueeze(-1)
    lse_BNQ.copy_(merged_lse_BNQ)


def _kernel(q_BNQH: Tensor) -> str:
    device, dtype = q_BNQH.device.type, q_BNQH.dtype
    if device == "cuda":
        half = dtype in (torch.float16, torch.bfloat16)
        return "cuda" if half and q_BNQH.shape[-1] % 8 == 0 else "reference"
    return "cpu" if device == "cpu" else "reference"


def reference_attend(
    q_BNQH: Tensor, k_BMKH: Tensor, v_BMKH: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """`attend` by definition."""
    scores_BNQK = _scores(q_BNQH, k_BMKH, is_causal)
    out_BNQH = scores_BNQK.softmax(-1) @ _per_query_head(v_BMKH, q_BNQH)
    return out_BNQH.to(q_BNQH.dtype), scores_BNQK.logsumexp(-1)


def reference_attend_backward(
    grad_BNQH: Tensor,
    q_BNQH: Tensor,
    k_BMKH: Tensor,
    v_BMKH: Tensor,
    out_BNQH: Tensor,
    lse_BNQ: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` by definition (2205.14135, appendix B.2)."""
    share_BNQK = (_scores(q_BNQH, k_BMKH, is_causal) - lse_BNQ.unsqueeze(-1)).exp()
    grad = _wide(grad_BNQH)
    inner_BNQ1 = (grad * out_BNQH).sum(-1, keepdim=True)
    grad_share_BNQK = grad @ _per_query_head(v_BMKH, q_BNQH).transpose(-1, -2)
    grad_scores_BNQK = share_BNQK * (grad_share_BNQK - inner_BNQ1) * q_BNQH.shape[-1] ** -0.5
    grads_BNKH = (
        grad_scores_BNQK.transpose(-1, -2) @ _wide(q_BNQH),
        share_BNQK.transpose(-1, -2) @ grad,
    )
    num_kv_heads = k_BMKH.shape[1]
    grad_k, grad_v = (x.unflatten(1, (num_kv_heads, -1)).sum(2) for x in grads_BNKH)
    grad_q = grad_scores_BNQK @ _per_query_head(k_BMKH, q_BNQH)
    return grad_q.to(q_BNQH.dtype), grad_k.to(k_BMKH.dtype), grad_v.to(v_BMKH.dtype)


def reference_attention(
    q_BNQH: Tensor, k_BMKH: Tensor, v_BMKH: Tensor, ends: DocumentEnds | None = None
) -> Tensor:
    """Whole sequences on one rank: a token sees itself and the earlier ones of its own document. Differentiable.

    What ring and Ulysses attention compute together.
    """
    scores_BNQK = _scores(q_BNQH, k_BMKH, is_causal=True)
    if ends is not None:
        positions = torch.arange(q_BNQH.shape[2])
        document_ids_BQ = torch.stack(
            [torch.bucketize(positions, torch.tensor(e), right=True) for e in ends]
        ).to(q_BNQH.device)
        same_BQK = document_ids_BQ[:, :, None] == document_ids_BQ[:, None, :]
        scores_BNQK = scores_BNQK.masked_fill(~same_BQK[:, None], -torch.inf)
    return (scores_BNQK.softmax(-1) @ _per_query_head(v_BMKH, q_BNQH)).to(q_BNQH.dtype)


def _scores(q_BNQH: Tensor, k_BMKH: Tensor, is_causal: bool) -> Tensor:
    k_BNKH = _per_query_head(k_BMKH, q_BNQH)
    scores_BNQK = _wide(q_BNQH) @ k_BNKH.transpose(-1, -2) * q_BNQH.shape[-1] ** -0.5
    if is_causal:
        later_QK = torch.ones_like(scores_BNQK[0, 0], dtype=torch.bool).triu(1)
        scores_BNQK = scores_BNQK.masked_fill(later_QK, -torch.inf)
    return scores_BNQK


def _per_query_head(x_BMKH: Tensor, q_BNQH: Tensor) -> Tensor:
    return _wide(x_BMKH).repeat_interleave(q_BNQH.shape[1] // x_BMKH.shape[1], dim=1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
