"""Root-mean-square normalisation (1910.07467). Shapes: N rows, D normalised elements."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesys.ops import library


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in x's dtype; x [..., D] of any shape.

    On the CPU in fp32 one pass each way, keeping x and one number per row; elsewhere torch's rms_norm.
    """
    is_fp32 = x.dtype == weight_D.dtype == torch.float32
    if not (is_fp32 and x.device.type == "cpu" and library.runs_on(x)):
        # Of one type, or torch takes the slow way.
        return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)
    x_ND = x.reshape(-1, x.shape[-1])
    return torch.ops.moesys.rms_norm(x_ND, weight_D, eps)[0].view(x.shape)


if library.is_loaded():

    @torch.library.register_fake("moesys::rms_norm")
    def _(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x_ND.new_empty(x_ND.shape), x_ND.new_empty(x_ND.shape[0])

    @torch.library.register_fake("moesys::rms_norm_backward")
    def _(
        grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, scales_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        return x_ND.new_empty(x_ND.shape), weight_D.new_empty(weight_D.shape)

    def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, ...]) -> None:
        x_ND, weight_D, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x_ND, weight_D, output[1])

    def _backward(ctx: Any, grad_ND: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        grads = torch.ops.moesys.rms_norm_backward(grad_ND, *ctx.saved_tensors)
        return grads[0], grads[1], None

    torch.library.register_autograd("moesys::rms_norm", _backward, setup_context=_setup)
