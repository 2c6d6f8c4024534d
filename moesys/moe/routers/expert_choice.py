"""Experts choose tokens.

Shapes: T tokens on this rank, U tokens of all ranks that share sequences, B sequences of S tokens, E experts,
C tokens per expert and sequence.
"""

from typing import Any

import torch
from torch import Tensor

from moesys.moe.routers.topk import TopKRouter
from moesys.moe.routing import RoutingResult
from moesys.moe.tokens import Tokens


class ExpertChoiceRouter(TopKRouter):
    """Of each sequence every expert takes the C = ceil(S * K / E) tokens that want it most (2202.09368, eq. 1-3).

    The weight is the token's softmax score. Load is even by construction; a token may get any number of experts, or none.
    Ranks that share a sequence gather its scores, so every layout chooses alike. Which tokens are taken depends
    on later ones of the sequence: a model that generates text token by token cannot choose as it did in training.
    """

    needs_whole_sequences = True

    def __init__(self, **options: Any) -> None:
        super().__init__(score_function="softmax", normalize_weights=False, **options)

    def forward(
        self, x_TD: Tensor, state: Tensor | None = None, tokens: Tokens | None = None
    ) -> RoutingResult:
        """Slots are [T, E]: slot e has expert e or none. No host sync."""
        assert tokens is not None, "the layer passes tokens"
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD.float())
            probs_TE = logits_TE.softmax(dim=-1)
            is_chosen_TE = self._choose(probs_TE.detach(), tokens)
            ids_E = torch.arange(probs_TE.shape[1], device=probs_TE.device)
        return RoutingResult(
            topk_ids_TK=torch.where(is_chosen_TE, ids_E, -1),
            topk_weights_TK=(probs_TE * self.scaling_factor).masked_fill(~is_chosen_TE, 0.0),
            logits_TE=logits_TE,
            probs_TE=probs_TE,
        )

    def _choose(self, probs_TE: Tensor, tokens: Tokens) -> Tensor:
        """bool [T, E]."""
        by_sequence = tokens.by_sequence(probs_TE.device)
        probs_BSE = by_sequence.split(tokens.gathered(probs_TE))
        seq_len, num_experts = probs_BSE.shape[1:]
        num_chosen = min(seq_len, -(-seq_len * self.top_k // num_experts))
        chosen_BCE = probs_BSE.topk(num_chosen, dim=1)[1]
        is_chosen_BSE = torch.zeros_like(probs_BSE, dtype=torch.bool).scatter_(1, chosen_BCE, True)
        return tokens.own(by_sequence.join(is_chosen_BSE))
