"""The activation of every expert. Shapes: N rows, F expert hidden."""

from typing import Any

import torch
from torch import Tensor

from moesys.ops import library, reference


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """hidden_NF = silu(gate) * up, where gate_up_N2F = [gate_NF | up_NF].

    fp32, fp64, bf16 or fp16; computed in fp32 (fp64 for fp64) and rounded once. The gradient keeps
    only gate_up and recomputes the rest in one pass (Shazeer, arXiv 2002.05202).

    Raises:
        ValueError: not two-dimensional, an odd number of columns, or another type.
    """
    if (
        gate_up_N2F.dim() != 2
        or gate_up_N2F.shape[1] % 2
        or not gate_up_N2F.dtype.is_floating_point
    ):
        raise ValueError(
            "gate_up must be floating point [N, 2F], got "
            f"{gate_up_N2F.dtype} {list(gate_up_N2F.shape)}"
        )
    if library.runs_on(gate_up_N2F):
        return torch.ops.moesys.swiglu(gate_up_N2F)
    return reference.swiglu(gate_up_N2F)


if library.is_loaded():

    @torch.library.register_fake("moesys::swiglu")
    def _(gate_up_N2F: Tensor) -> Tensor:
        return gate_up_N2F.new_empty(gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2)

    @torch.library.register_fake("moesys::swiglu_backward")
    def _(grad_hidden_NF: Tensor, gate_up_N2F: Tensor) -> Tensor:
        return gate_up_N2F.new_empty(gate_up_N2F.shape)

    def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def _backward(ctx: Any, grad_hidden_NF: Tensor) -> Tensor:
        return torch.ops.moesys.swiglu_backward(grad_hidden_NF, *ctx.saved_tensors)

    torch.library.register_autograd("moesys::swiglu", _backward, setup_context=_setup)
