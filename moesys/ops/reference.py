"""Every op in obvious torch: what the compiled ops are compared to, and what runs without them.

Only rms_norm, cross_entropy_sum and grouped_linear then run torch's own ops instead of these.
Differentiable by plain autograd on any device. Shapes: T tokens, K slots per token (slot t*K+k),
N rows, D model, F expert hidden, E experts; V classes; R rows in expert order, L experts on this
rank, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F_
from torch import Tensor


def tokens_per_expert(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    ids = topk_ids_TK.reshape(-1).long()
    if topk_ids_TK.device.type == "cpu":
        _check_ids(ids, num_experts)
    # Dropped slots are counted in a bin of their own, then cut off.
    bins = torch.where(ids < 0, num_experts, ids)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:num_experts]


def expert_order(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    counts_E = tokens_per_expert(topk_ids_TK, num_experts)
    ids = topk_ids_TK.reshape(-1).long()
    slots = torch.arange(ids.numel(), device=ids.device)
    slot_of_row = torch.where(ids < 0, num_experts, ids).argsort(stable=True)
    has_row = slots < counts_E.sum()
    row_of_slot = torch.empty_like(slots).scatter_(0, slot_of_row, torch.where(has_row, slots, -1))
    return row_of_slot.view(topk_ids_TK.shape), torch.where(has_row, slot_of_row, -1), counts_E


def permute(x_TD: Tensor, slot_of_row_N: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    # A row of zeros in front stands for "no slot": -1 // K + 1 = 0.
    tokens = F_.pad(x_TD, (0, 0, 1, 0))
    top_k = max(row_of_slot_TK.shape[1], 1)
    return tokens[slot_of_row_N // top_k + 1]


def unpermute(rows_ND: Tensor, weights_TK: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    # A row of zeros stands for "no row".
    rows = F_.pad(rows_ND.to(weights_TK.dtype), (0, 0, 0, 1))
    index_TK = torch.where(row_of_slot_TK < 0, rows_ND.shape[0], row_of_slot_TK)
    return (rows[index_TK] * weights_TK[..., None]).sum(dim=1).to(rows_ND.dtype)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    compute = torch.promote_types(gate_up_N2F.dtype, torch.float32)
    gate_NF, up_NF = gate_up_N2F.to(compute).chunk(2, dim=-1)
    return (F_.silu(gate_NF) * up_NF).to(gate_up_N2F.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    mean_square = x.square().mean(dim=-1, keepdim=True)
    return x / (mean_square + eps).sqrt() * weight_D


def cross_entropy_sum(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    is_counted_T = targets_T != -100
    logits, targets = logits_TV[is_counted_T], targets_T[is_counted_T]
    return (logits.logsumexp(dim=1) - logits.gather(1, targets[:, None])[:, 0]).sum()


def grouped_linear(rows_RI: Tensor, weight_LOI: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
    counts_list = tokens_per_expert_L.tolist()
    spare = rows_RI.shape[0] - sum(counts_list)
    *rows_of_expert, _ = rows_RI.split([*counts_list, spare])
    outs = [rows @ weight.t() for rows, weight in zip(rows_of_expert, weight_LOI, strict=True)]
    return torch.cat([*outs, rows_RI.new_zeros(spare, weight_LOI.shape[1])])


def _check_ids(ids: Tensor, num_experts: int) -> None:
    bad = ((ids < -1) | (ids >= num_experts)).nonzero()
    if bad.numel():
        slot = int(bad[0])
        raise RuntimeError(
            f"expert id {int(ids[slot])} of slot {slot} is not -1 and not in 0..{num_experts - 1}"
        )
