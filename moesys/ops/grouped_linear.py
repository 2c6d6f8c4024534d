"""One linear map per expert over rows grouped by expert.

Shapes: R rows in expert order, L experts, I inputs, O outputs.

    out[r] = weight[expert of r] @ rows[r]

Two backends with the same result: torch's grouped_mm, and a loop over experts. The loop is our own compiled
product in fp32 on the CPU, elsewhere one torch product per expert that writes straight into its slice. Which is
faster depends on shapes and machine; measure.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moesys.ops import library
from moesys.ops.needed import needed_gradients

GroupedBackend = Literal["grouped_mm", "loop"]


def grouped_linear(
    rows_RI: Tensor, weight_LOI: Tensor, tokens_per_expert_L: Tensor, backend: GroupedBackend
) -> Tensor:
    """Return [R, O] in rows' dtype. `tokens_per_expert_L` int64 sums to at most R; rows past the sum are undefined.

    `loop` reads the counts on the host (one sync, L ints); `grouped_mm` does not, but takes no fp64, and only
    inputs and outputs whose rows are a multiple of 16 bytes.
    """
    weight_LOI = weight_LOI.to(rows_RI.dtype)
    if rows_RI.shape[0] == 0:
        # Still part of the graph, with zero gradients: every rank must reach its backward exchange.
        return rows_RI @ weight_LOI[0].t()
    if backend == "grouped_mm":
        ends_L = tokens_per_expert_L.cumsum(0).to(torch.int32)
        return F.grouped_mm(rows_RI, weight_LOI.transpose(-2, -1), offs=ends_L)
    if rows_RI.dtype == torch.float32 and rows_RI.device.type == "cpu" and library.runs_on(rows_RI):
        return torch.ops.moesys.grouped_linear(rows_RI, weight_LOI, tokens_per_expert_L)
    return _LoopLinear.apply(rows_RI, weight_LOI, tokens_per_expert_L.tolist())


class _LoopLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RI: Tensor, weight_LOI: Tensor, counts_list: list[int]) -> Tensor:
        out_RO = rows_RI.new_empty(rows_RI.shape[0], weight_LOI.shape[1])
        for expert, rows in _slices(counts_list):
            torch.mm(rows_RI[rows], weight_LOI[expert].t(), out=out_RO[rows])
        ctx.save_for_backward(rows_RI, weight_LOI)
        ctx.counts_list = counts_list
        return out_RO

    @staticmethod
    def backward(ctx, grad_RO: Tensor):  # type: ignore[override]
        rows_RI, weight_LOI = ctx.saved_tensors
        needs_rows, needs_weight = needed_gradients(ctx)
        grad_rows_RI = torch.empty_like(rows_RI) if needs_rows else None
        grad_weight_LOI = torch.empty_like(weight_LOI) if needs_weight else None
        grad_RO = grad_RO.contiguous()
        for expert, rows in _slices(ctx.counts_list):
            if grad_rows_RI is not None:
                torch.mm(grad_RO[rows], weight_LOI[expert], out=grad_rows_RI[rows])
            if grad_weight_LOI is not None:
                # An expert without rows gets the empty product: zeros.
                torch.mm(grad_RO[rows].t(), rows_RI[rows], out=grad_weight_LOI[expert])
        return grad_rows_RI, grad_weight_LOI, None


def _slices(counts_list: list[int]) -> list[tuple[int, slice]]:
    start = 0
    slices = []
    for expert, count in enumerate(counts_list):
        slices.append((expert, slice(start, start + count)))
        start += count
    return slices


if library.is_loaded():

    @torch.library.register_fake("moesys::grouped_linear")
    def _(rows_RI: Tensor, weight_LOI: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
        return rows_RI.new_empty(rows_RI.shape[0], weight_LOI.shape[1])

    @torch.library.register_fake("moesys::grouped_linear_grad_rows")
    def _(grad_RO: Tensor, weight_LOI: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
        return grad_RO.new_empty(grad_RO.shape[0], weight_LOI.shape[2])

    @torch.library.register_fake("moesys::grouped_linear_grad_weight")
    def _(grad_RO: Tensor, rows_RI: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
        return rows_RI.new_empty(tokens_per_expert_L.shape[0], grad_RO.shape[1], rows_RI.shape[1])

    def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RI, weight_LOI, counts_L = ctx.saved_tensors
        ops = torch.ops.moesys
        needs_rows, needs_weight, _ = needed_gradients(ctx)
        return (
            ops.grouped_linear_grad_rows(grad_RO, weight_LOI, counts_L) if needs_rows else None,
            ops.grouped_linear_grad_weight(grad_RO, rows_RI, counts_L) if needs_weight else None,
            None,
        )

    torch.library.register_autograd("moesys::grouped_linear", _backward, setup_context=_setup)

    # So that torch's FlopCounterMode counts the products that are not torch's own.
    @register_flop_formula(
        [
            torch.ops.moesys.grouped_linear,
            torch.ops.moesys.grouped_linear_grad_rows,
        ]
    )
    def _(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
        return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]

    @register_flop_formula(torch.ops.moesys.grouped_linear_grad_weight)
    def _(grad_shape: Any, rows_shape: Any, *_: Any, **__: Any) -> int:
        return 2 * grad_shape[0] * grad_shape[1] * rows_shape[1]
