"""The contract between a router and the rest of the MoE layer.

Shapes: T tokens on this rank, D model, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RoutingResult:
    """What a router decided for T tokens. Decisions are saved under recompute, never made twice."""

    topk_ids_TK: Tensor
    """int64, expert of each slot; -1 = no expert. Experts of one token are distinct."""
    topk_weights_TK: Tensor
    """fp32, the weight of each slot in the combined output; 0 where the id is -1."""
    logits_TE: Tensor
    """fp32, before any score function (what a z-loss reads)."""
    probs_TE: Tensor
    """fp32, scores normalised to sum 1 over E, without selection bias (what a balance loss reads)."""
    extra_loss: Tensor | None = None
    """Scalar mean over tokens of a loss of the router's own, added to the balance losses."""
    state: Tensor | None = None
    """fp32 [T, state_dim], what a recurrent router hands to the next layer's router; the first gets None."""


class Router(Protocol):
    """A torch module with this forward. Built as `Router(d_model=, num_experts=, top_k=, **options)`.

    One that hands on a state has an attribute `state_dim`, its numbers per token: a pipeline's stages are told it.
    """

    def __call__(self, x_TD: Tensor, state: Tensor | None = None) -> RoutingResult: ...
