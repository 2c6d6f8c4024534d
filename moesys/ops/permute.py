"""Tokens to rows grouped by expert, and back.

Shapes: T tokens, K slots per token (slot t*K+k), N rows, D model. `slot_of_row_N` and
`row_of_slot_TK` (see expert_order) are inverses of each other wherever neither is -1: at most one
row per slot and one slot per row. That is the caller's promise; it is not checked.
"""

from typing import Any

import torch
from torch import Tensor

from moesys.ops import library, reference


def permute(x_TD: Tensor, slot_of_row_N: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    """Copy each row's token: rows_ND[n] = x_TD[slot_of_row_N[n] // K].

    Args:
        x_TD: any type; differentiable in fp32, fp64, bf16 and fp16.
        slot_of_row_N: int64, the slot each row serves, or -1: a row of zeros. As many rows come
            out as it has entries: trim it to the rows that exist, or leave the tail, or give each
            expert a fixed number of rows with -1 between.
        row_of_slot_TK: int64, the row each slot got, or -1 (read by the gradient, which sums a
            token's rows in fp32: dx[t] = sum_k drows[row_of_slot[t, k]]).

    With K = 1 this reorders rows; its inverse is permute(rows, row_of_slot[:, 0], slot_of_row[:, None]).

    Raises:
        ValueError: shapes or types differ from the above.
        RuntimeError: an index out of range, on the CPU. On a GPU that is a device-side assertion.
    """
    _check_slots(row_of_slot_TK)
    if x_TD.dim() != 2 or x_TD.shape[0] != row_of_slot_TK.shape[0]:
        raise ValueError(
            f"x must be [T, D] with T = {row_of_slot_TK.shape[0]} as in row_of_slot, "
            f"got {list(x_TD.shape)}"
        )
    if slot_of_row_N.dim() != 1 or slot_of_row_N.dtype != torch.int64:
        raise ValueError(
            f"slot_of_row must be int64 [N], got {slot_of_row_N.dtype} {list(slot_of_row_N.shape)}"
        )
    if library.runs_on(x_TD):
        return torch.ops.moesys.permute(x_TD, slot_of_row_N, row_of_slot_TK)
    return reference.permute(x_TD, slot_of_row_N, row_of_slot_TK)


def unpermute(rows_ND: Tensor, weights_TK: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    """Sum each token's rows: x_TD[t] = sum_k weights_TK[t, k] * rows_ND[row_of_slot_TK[t, k]].

    Args:
        rows_ND: fp32, fp64, bf16 or fp16.
        weights_TK: fp32 (fp64 with fp64 rows).
        row_of_slot_TK: int64, -1 = no row: the slot is skipped and its weight gets no gradient.

    Returns:
        x_TD of rows' type, summed in weights' type in the order of k. One pass gives both
        gradients: drows[n] = w * dx[t] (zero for a row that serves no slot) and
        dweights[t, k] = <dx[t], rows[n]>.

    Raises:
        ValueError, RuntimeError: as permute.
    """
    _check_slots(row_of_slot_TK)
    if rows_ND.dim() != 2 or not rows_ND.dtype.is_floating_point:
        raise ValueError(
            f"rows must be floating point [N, D], got {rows_ND.dtype} {list(rows_ND.shape)}"
        )
    weights_dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    if weights_TK.shape != row_of_slot_TK.shape or weights_TK.dtype != weights_dtype:
        raise ValueError(
            f"weights must be {weights_dtype} {list(row_of_slot_TK.shape)} as row_of_slot, "
            f"got {weights_TK.dtype} {list(weights_TK.shape)}"
        )
    if library.runs_on(rows_ND):
        return torch.ops.moesys.unpermute(rows_ND, weights_TK, row_of_slot_TK)
    return reference.unpermute(rows_ND, weights_TK, row_of_slot_TK)


def _check_slots(row_of_slot_TK: Tensor) -> None:
    if row_of_slot_TK.dim() != 2 or row_of_slot_TK.dtype != torch.int64:
        raise ValueError(
            "row_of_slot must be int64 [T, K], got "
            f"{row_of_slot_TK.dtype} {list(row_of_slot_TK.shape)}"
        )


if library.is_loaded():

    @torch.library.register_fake("moesys::permute")
    def _(x_TD: Tensor, slot_of_row_N: Tensor, row_of_slot_TK: Tensor) -> Tensor:
        return x_TD.new_empty(slot_of_row_N.shape[0], x_TD.shape[1])

    @torch.library.register_fake("moesys::permute_backward")
    def _(grad_rows_ND: Tensor, row_of_slot_TK: Tensor) -> Tensor:
        return grad_rows_ND.new_empty(row_of_slot_TK.shape[0], grad_rows_ND.shape[1])

    @torch.library.register_fake("moesys::unpermute")
    def _(rows_ND: Tensor, weights_TK: Tensor, row_of_slot_TK: Tensor) -> Tensor:
        return rows_ND.new_empty(row_of_slot_TK.shape[0], rows_ND.shape[1])

    @torch.library.register_fake("moesys::unpermute_backward")
    def _(
        grad_x_TD: Tensor, rows_ND: Tensor, weights_TK: Tensor, row_of_slot_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        return rows_ND.new_empty(rows_ND.shape), weights_TK.new_empty(weights_TK.shape)

    def _permute_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    def _permute_backward(ctx: Any, grad_rows_ND: Tensor) -> tuple[Tensor, None, None]:
        (row_of_slot_TK,) = ctx.saved_tensors
        return torch.ops.moesys.permute_backward(grad_rows_ND, row_of_slot_TK), None, None

    def _unpermute_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def _unpermute_backward(ctx: Any, grad_x_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        grads = torch.ops.moesys.unpermute_backward(grad_x_TD, *ctx.saved_tensors)
        return grads[0], grads[1], None

    torch.library.register_autograd(
        "moesys::permute", _permute_backward, setup_context=_permute_setup
    )
    torch.library.register_autograd(
        "moesys::unpermute", _unpermute_backward, setup_context=_unpermute_setup
    )
