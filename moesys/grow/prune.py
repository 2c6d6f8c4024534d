"""Experts taken away: which ones, by what they did on a sample. The choice is pure.

Shapes: T tokens, M MoE layers, E experts, K experts per token.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moesys.config.errors import ConfigError, Problem
from moesys.grow.experts import experts_by_layer, keep_experts
from moesys.grow.part import Part
from moesys.grow.write import Growth
from moesys.models.mtp import targets_ahead
from moesys.models.transformer import Transformer
from moesys.moe.layer import MoELayer
from moesys.moe.listening import Listening
from moesys.moe.routing import RoutingResult
from moesys.moe.tokens import Known
from moesys.moe.visits import slots

By = Literal["utilisation", "premoe"]


def prune(
    part: Part, scores_ME: Sequence[Sequence[float]], keep: int, measured: Mapping[str, Any]
) -> Growth:
    """The model with the `keep` best experts of each layer, or all of a layer that has fewer; rows of the router and
    selection bias go with them.

    Source: expert pruning by utilisation of Z-code M3 (2109.10465). Where no token of a text visits the experts that go,
    and weights are normalised over a token's experts (or each expert's own, as with sigmoid), the model gives on that
    text what it gave.

    `measured` says what the scores are, for the record.

    Raises:
        ConfigError: `keep` breaks a rule, or the router's rows are not of their own layer's experts.
    """
    moe = part.model.moe
    problems = []
    if not moe.top_k <= keep < moe.num_experts:
        problems.append(
            Problem(
                key="--keep",
                given=keep,
                rule=f"must be at least model.moe.top_k={moe.top_k} and below "
                f"model.moe.num_experts={moe.num_experts}",
                fix=f"use {moe.top_k} to {moe.num_experts - 1}",
            )
        )
    if moe.router.target.endswith(".PreGatedRouter"):
        problems.append(
            Problem(
                key="model.moe.router._target_",
                given=moe.router.target,
                rule="decides for the next layer, whose experts are others",
                fix="prune a model with another router",
            )
        )
    if problems:
        raise ConfigError(problems)
    kept = [
        best(scores_E[:number], keep)
        for scores_E, number in zip(scores_ME, experts_by_layer(part.model), strict=True)
    ]
    origin = {"operation": "prune", "from": str(part.folder), **measured, "kept": kept}
    return keep_experts(part, kept, moe.top_k, origin)


def best(scores_E: Sequence[float], keep: int) -> list[int]:
    """The experts of the `keep` largest scores, in their order; of equal ones the first."""
    ranked = sorted(range(len(scores_E)), key=lambda expert: (-scores_E[expert], expert))
    return sorted(ranked[:keep])


@torch.no_grad()
def measured_scores(
    model: Transformer, sequences: Iterable[Tensor], by: By, threshold: float
) -> list[list[float]]:
    """[M][E] over token ids [B, S] that the model is given: slots, or `utility` per token."""
    layers = model.moe_layers()
    totals = [torch.zeros(layer.config.num_choices, dtype=torch.float64) for layer in layers]
    num_tokens = 0

    def hear(at: int, layer: MoELayer, known: Known, routed: RoutingResult) -> None:
        totals[at] += utility(routed, threshold) if by == "premoe" else slots(routed)

    with Listening(dict(enumerate(layers)), hear):
        for ids_BS in sequences:
            # With the tokens that follow, layers of multi-token prediction are judged too.
            model(ids_BS, targets_BSN=targets_ahead(ids_BS, 1 + len(model.mtp))[..., 1:])
            num_tokens += ids_BS.numel()
    return [(t / max(1, num_tokens) if by == "premoe" else t).tolist() for t in totals]


def utility(routed: RoutingResult, threshold: float) -> Tensor:
    """fp64 [E], summed over tokens: p_ti where token t takes expert i with at least `threshold` of its weight, else 0.

    Source: PreMoE's predicted expert utility (2505.17639): the router's own scores, of decisions that it is sure of. That
    the score is the routing probability p and the share is of the K experts chosen is our reading; the paper transforms
    the logits.
    """
    ids_TK, weights_TK = routed.topk_ids_TK, routed.topk_weights_TK.double()
    shares_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    is_sure_TK = (ids_TK >= 0) & (shares_TK >= threshold)
    probs_TK = routed.probs_TE.double().gather(1, ids_TK.clamp(min=0)) * is_sure_TK
    total_E = torch.zeros(routed.probs_TE.shape[1], dtype=torch.float64)
    return total_E.scatter_add_(0, ids_TK.clamp(min=0).flatten(), probs_TK.flatten())
