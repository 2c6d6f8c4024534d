"""Cross-entropy summed over tokens. Shapes: T tokens, V classes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesys.ops import library

IGNORED_TARGET = -100
"""A target that does not count, as torch's ignore_index."""


def cross_entropy_sum(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """sum_t logsumexp(logits_t) - logits_t[target_t] in nats; a target of -100 does not count.

    On the CPU in fp32 the log-probabilities are never stored: the gradient recomputes them from the logits.

    Raises:
        RuntimeError, IndexError: a target outside 0..V-1 that is not -100, on the CPU.
    """
    is_fp32 = logits_TV.dtype == torch.float32
    if not (is_fp32 and logits_TV.device.type == "cpu" and library.runs_on(logits_TV)):
        return F.cross_entropy(logits_TV, targets_T, reduction="sum")
    return torch.ops.moesys.cross_entropy(logits_TV, targets_T)[0]


if library.is_loaded():

    @torch.library.register_fake("moesys::cross_entropy")
    def _(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        return logits_TV.new_empty(()), logits_TV.new_empty(logits_TV.shape[0])

    @torch.library.register_fake("moesys::cross_entropy_backward")
    def _(grad: Tensor, logits_TV: Tensor, targets_T: Tensor, lse_T: Tensor) -> Tensor:
        return logits_TV.new_empty(logits_TV.shape)

    def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return torch.ops.moesys.cross_entropy_backward(grad, *ctx.saved_tensors), None

    torch.library.register_autograd("moesys::cross_entropy", _backward, setup_context=_setup)
