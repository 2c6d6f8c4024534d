"""Every op in obvious torch: what the compiled ops are compared to, and what runs without them.

Only rms_norm, cross_entropy_sum and grouped_linear then run torch's own ops instead of these.
Differentiable by plain autograd on any device. Shapes: T tokens, K slots per token (slot t*K+k),
N rows, D model, F expert hidden, E experts; V classes; R rows in expert order, L experts on this
rank, I inputs, O outputs.
"""

import math
from collections.abc import Sequence

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


def cross_polytope(turned_THV: Tensor) -> Tensor:
    bad_T = ~turned_THV.isfinite().all(dim=2).all(dim=1)
    if bad_T.any():
        raise RuntimeError(f"cross_polytope: row {int(bad_T.nonzero()[0])} is not finite")
    place_TH = turned_THV.abs().argmax(dim=2)
    is_negative_TH = turned_THV.gather(2, place_TH[..., None])[..., 0] < 0
    return 2 * place_TH + is_negative_TH


def member_means(
    x_TD: Tensor, row_of_slot_TK: Tensor, member_slots_M: Tensor, first_member_X: Tensor
) -> Tensor:
    compute = torch.promote_types(x_TD.dtype, torch.float32)
    top_k = max(row_of_slot_TK.shape[1], 1)
    sizes_C = first_member_X.diff()
    row_M = torch.arange(sizes_C.numel(), device=x_TD.device).repeat_interleave(sizes_C)
    sums_CD = x_TD.new_zeros(sizes_C.numel(), x_TD.shape[1], dtype=compute)
    sums_CD = sums_CD.index_add(
        0, row_M, x_TD.to(compute)[member_slots_M[: row_M.numel()] // top_k]
    )
    return (sums_CD / sizes_C.clamp(min=1)[:, None]).to(x_TD.dtype)


def restore(
    rows_CD: Tensor,
    means_CD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    slopes_C: Tensor,
    row_of_slot_TK: Tensor,
) -> Tensor:
    compute = weights_TK.dtype
    # A row of zeros with no slope stands for "no row".
    rows = F_.pad(rows_CD.to(compute), (0, 0, 0, 1))
    means = F_.pad(means_CD.to(compute), (0, 0, 0, 1))
    slopes = F_.pad(slopes_C, (0, 1))
    index_TK = torch.where(row_of_slot_TK < 0, rows_CD.shape[0], row_of_slot_TK)
    residuals_TKD = x_TD.to(compute)[:, None] - means[index_TK]
    restored_TKD = rows[index_TK] + slopes[index_TK][..., None] * residuals_TKD
    return (restored_TKD * weights_TK[..., None]).sum(dim=1).to(x_TD.dtype)


def pack(
    x_TD: Tensor,
    slot_of_row_N: Tensor,
    top_k: int,
    format: int,
    block: int,
    is_stochastic: bool,
    carried_rows: int,
    is_checked: bool,
) -> Tensor:
    bad_N = (slot_of_row_N < -1) | (slot_of_row_N >= x_TD.shape[0] * top_k)
    if bad_N.any():
        raise RuntimeError("pack: slot_of_row has an entry that is neither -1 nor a valid index")
    # A row that serves no slot is zeros.
    rows_ND = F_.pad(x_TD.float(), (0, 0, 1, 0))[slot_of_row_N // top_k + 1]
    bad_rows = (~rows_ND.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad_rows and is_checked:
        raise RuntimeError(f"pack: row {bad_rows[0]} is not finite")
    num_rows, width = rows_ND.shape
    most = LARGEST[format]
    codes, scales = [], []
    for start in range(0, width, block or width):
        values_NB = rows_ND[:, start : start + (block or width)]
        codes_NB = torch.empty(values_NB.shape, dtype=torch.uint8, device=x_TD.device)
        scales_N1 = values_NB.new_empty(num_rows, 1)
        # Rows that hand on what rounding took are done one after the other, all such groups side by side.
        stride = carried_rows or 1
        carry = torch.zeros_like(values_NB[::stride])
        for place in range(stride):
            some = slice(place, None, stride)
            is_finite = values_NB[some].isfinite().all(dim=1, keepdim=True)
            values = torch.where(is_finite, values_NB[some], 0.0)
            carry = carry[: values.shape[0]]
            scale = values.abs().amax(dim=1, keepdim=True) / most
            scale = torch.where(scale < 2.0**-120, 0.0, scale)
            if carried_rows:
                # More than a step would be worse for a row than its own rounding; the rest waits.
                step = _step(values, scale, format)
                given = carry.clamp(-step, step)
                carry = carry - given
                values = (values + given).clamp(-_FLOAT_MAX, _FLOAT_MAX)
            scaled = values * torch.where(scale > 0, 1 / scale, 0.0)
            noise: Tensor | float = 0.0
            if is_stochastic:
                rows = torch.arange(num_rows, device=x_TD.device)[some]
                noise = _noise(scale[:, 0], rows, len(scales), values.shape[1])
            codes_NB[some] = _encoded(scaled, noise, format)
            if carried_rows:
                carry = carry + (values - _decoded(codes_NB[some], format) * scale)
            scales_N1[some] = torch.where(is_finite, scale, math.nan)
        codes.append(codes_NB)
        scales.append(scales_N1.contiguous().view(torch.uint8))
    return torch.cat([_paired(torch.cat(codes, dim=1), format), *scales], dim=1)


def unpack(bytes_NW: Tensor, like: Tensor, d: int, format: int, block: int) -> Tensor:
    code_bytes = -(-d // CODES_PER_BYTE[format])
    codes_ND = _parted(bytes_NW[:, :code_bytes], format)[:, :d]
    scales = (
        bytes_NW[:, code_bytes:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    )
    scales_ND = scales.repeat_interleave(block or d, dim=1)[:, :d]
    return (_decoded(codes_ND, format) * scales_ND).to(like.dtype)


def pack_chunks(chunks: Sequence[Tensor], like: Tensor) -> Tensor:
    flats = [chunk.reshape(-1).to(like.dtype) for chunk in chunks]
    return torch.cat([like.new_empty(0), *flats])


def add_chunks(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for part, total in pairs:
        total.add_(part.view_as(total))


_FLOAT_MAX = torch.finfo(torch.float32).max
_FP8 = (None, torch.float8_e4m3fn, torch.float8_e5m2, None)
LARGEST = (127.0, 448.0, 57344.0, 7.0)
CODES_PER_BYTE = (1, 1, 1, 2)
"""By the number of a format, as the two above."""


def _paired(codes_ND: Tensor, format: int) -> Tensor:
    """Codes of four bits, two in a byte, the even column in its low half."""
    if CODES_PER_BYTE[format] == 1:
        return codes_ND
    codes_ND = F_.pad(codes_ND & 15, (0, codes_ND.shape[1] % 2))
    return codes_ND[:, ::2] | codes_ND[:, 1::2] << 4


def _parted(bytes_NB: Tensor, format: int) -> Tensor:
    if CODES_PER_BYTE[format] == 1:
        return bytes_NB
    codes_NB2 = torch.stack([bytes_NB & 15, bytes_NB >> 4], dim=2)
    return ((codes_NB2 ^ 8) - 8).flatten(1)  # the sign is the highest of four bits


def _encoded(scaled: Tensor, noise: Tensor | float, format: int) -> Tensor:
    most, dtype = LARGEST[format], _FP8[format]
    if dtype is None:
        return (scaled + noise).round().clamp(-most, most).to(torch.int8).view(torch.uint8)
    # Neighbours of a number are a power of two apart, of subnormal ones always the same.
    info = torch.finfo(dtype)
    exponent = scaled.abs().clamp(min=info.smallest_normal).frexp().exponent - 1
    quantum = torch.ldexp(torch.full_like(scaled, info.eps), exponent)
    rounded = (scaled / quantum + noise).round() * quantum
    rounded = rounded.clamp(-most, most) + 0.0  # zero has no sign
    return rounded.to(dtype).view(torch.uint8)


def _step(values: Tensor, scale: Tensor, format: int) -> Tensor:
    """Between the codes around each of `values`, or half of it."""
    dtype = _FP8[format]
    return scale.expand_as(values) if dtype is None else values.abs() * (torch.finfo(dtype).eps / 2)


def _decoded(codes: Tensor, format: int) -> Tensor:
    return codes.view(_FP8[format] or torch.int8).float()


def _noise(scale_N: Tensor, rows_N: Tensor, block: int, width: int) -> Tensor:
    key_N = _mixed(
        scale_N.contiguous().view(torch.int32).long() + _mixed(rows_N * 0x9E3779B9 + block + 1)
    )
    columns_D = torch.arange(width, device=scale_N.device)
    bits_ND = _mixed(key_N[:, None] + columns_D * 0x85157AF5)
    return (bits_ND >> 8).float() * 2.0**-24 - 0.5


def _mixed(x: Tensor) -> Tensor:
    x = x & 0xFFFFFFFF
    x = x ^ x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x = x ^ x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


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
