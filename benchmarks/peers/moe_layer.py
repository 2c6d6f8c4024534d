"""One MoE layer as every system here builds it: top-k of a softmax, weights normalised, SwiGLU experts.

Shapes: T tokens, D model, F expert hidden, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What is computed: forward and backward of one layer on T tokens."""

    num_experts: int
    top_k: int
    num_tokens: int
    d_model: int
    d_expert: int

    @property
    def flops(self) -> int:
        """Of the experts' matrix products, forward and backward."""
        return 18 * self.num_tokens * self.top_k * self.d_model * self.d_expert


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """A layer's weights, or their gradients, in the layout all systems are compared in."""

    router_ED: Tensor
    gate_up_E2FD: Tensor
    """[E, 2F, D]; the first F rows are the gate."""
    down_EDF: Tensor

    @classmethod
    def random(cls, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> "LayerWeights":
        """Normal, variance 1 / inputs: outputs of order 1, expert load uneven as in a young model."""

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device, dtype=dtype) * sizes[-1] ** -0.5

        e, d, f = shape.num_experts, shape.d_model, shape.d_expert
        return cls(
            router_ED=normal(e, d), gate_up_E2FD=normal(e, 2 * f, d), down_EDF=normal(e, d, f)
        )


class LayerContestant(Protocol):
    """A layer with a copy of the weights, ready to train."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """The combined output [T, D]."""
        ...

    def parameters(self) -> list[Tensor]:
        """What a backward fills the `.grad` of."""
        ...

    def gradients(self) -> LayerWeights:
        """The gradients of the last backward."""
        ...


def gradient(parameter: Tensor) -> Tensor:
    """A parameter's gradient; zeros for an expert that no token chose."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
