"""Expert capacity: how many slots an expert may take from one rank's tokens.

Shapes: T tokens, E experts, K experts per token, N = T * K slots.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moesys.moe.routing import RoutingResult
from moesys.ops import tokens_per_expert

Priority = Literal["weight", "order", "random"]


def capacity_rows(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """ceil(factor * T * K / E), at least 1 (GShard sec. 3.2)."""
    return max(1, math.ceil(factor * num_tokens * top_k / num_experts))


def within_capacity(
    routing: RoutingResult, num_experts: int, capacity: int, priority: Priority = "weight"
) -> RoutingResult:
    """Drop what is over capacity: each expert keeps `capacity` slots, by priority (ties: first token).

    A dropped slot has id -1 and weight 0; the other weights of its token stay as they are. Ids of `num_experts` and above
    have no limit.
    """
    ids_TK = routing.topk_ids_TK
    limited_TK = ids_TK.masked_fill(ids_TK >= num_experts, -1)
    rank_TK = _rank_in_expert(limited_TK, _priorities(routing, priority), num_experts)
    keep_TK = (rank_TK < capacity) | (limited_TK != ids_TK)
    return replace(
        routing,
        topk_ids_TK=ids_TK.masked_fill(~keep_TK, -1),
        topk_weights_TK=routing.topk_weights_TK.masked_fill(~keep_TK, 0.0),
    )


def _priorities(routing: RoutingResult, priority: Priority) -> Tensor:
    """[T, K], the larger the sooner an expert takes the slot."""
    weights_TK = routing.topk_weights_TK.detach()
    if priority == "weight":
        return weights_TK
    if priority == "random":
        return torch.rand_like(weights_TK)
    # First choices before second ones, as GShard and Switch fill their experts.
    choices_K = torch.arange(weights_TK.shape[1], device=weights_TK.device)
    return -choices_K.expand_as(weights_TK)


@torch.no_grad()
def _rank_in_expert(ids_TK: Tensor, priorities_TK: Tensor, num_experts: int) -> Tensor:
    """Position of each slot among its expert's slots, by falling priority. int64 [T, K]."""
    ids_N = ids_TK.flatten()
    by_priority_N = priorities_TK.flatten().argsort(descending=True, stable=True)
    order_N = by_priority_N[ids_N[by_priority_N].argsort(stable=True)]
    counts_X = tokens_per_expert(ids_N[:, None] + 1, num_experts + 1)  # X: no expert, then E
    first_X = counts_X.cumsum(0) - counts_X
    rank_N = torch.empty_like(ids_N)
    rank_N[order_N] = torch.arange(ids_N.numel(), device=ids_N.device)
    return (rank_N - first_X[ids_N + 1]).view_as(ids_TK)
