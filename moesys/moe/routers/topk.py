"""Token-choice top-k over softmax or sigmoid scores.

Shapes: T tokens, D model, E experts, K experts per token.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.moe.routing import RoutingResult


class TopKRouter(nn.Module):
    """scores = softmax(W x) or sigmoid(W x); the K best experts of scores + selection_bias.

    The weights are the chosen experts' own scores (the bias only selects), divided by their sum if
    `normalize_weights`, times `scaling_factor`. Everything is fp32 whatever the compute type.
    Sources: Switch/GShard (softmax), Mixtral (normalised), BASE and StableMoE (sigmoid, not normalised),
    DeepSeek-V3 sec. 2.1.2 (sigmoid, bias, scaling). Others differ in `logits` or in `select`.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_experts: int,
        top_k: int,
        score_function: Literal["softmax", "sigmoid"] = "softmax",
        normalize_weights: bool = True,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if score_function not in ("softmax", "sigmoid"):
            raise ValueError(
                f"router option score_function={score_function!r} must be 'softmax' or 'sigmoid'"
            )
        if not scaling_factor > 0:
            raise ValueError(f"router option scaling_factor={scaling_factor} must be above 0")
        self.top_k = top_k
        self.score_function = score_function
        self.normalize_weights = normalize_weights
        self.scaling_factor = scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_buffer("selection_bias_E", torch.zeros(num_experts))
        self.selection_bias_E: Tensor

    def forward(self, x_TD: Tensor, state: Tensor | None = None) -> RoutingResult:
        """Route x_TD (any float type) to K experts each. No host sync."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.choose(self.logits(x_TD.float()))

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E] from fp32 x_TD."""
        return F.linear(x_TD, self.weight.float())

    def choose(self, logits_TE: Tensor, state: Tensor | None = None) -> RoutingResult:
        """From logits to experts and their weights; `state` is handed on."""
        if self.score_function == "softmax":
            scores_TE = probs_TE = logits_TE.softmax(dim=-1)
        else:
            scores_TE = logits_TE.sigmoid()
            probs_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        topk_ids_TK = self.select(scores_TE.detach() + self.selection_bias_E)
        weights_TK = scores_TE.gather(1, topk_ids_TK)
        if self.normalize_weights:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return RoutingResult(
            topk_ids_TK=topk_ids_TK,
            topk_weights_TK=weights_TK * self.scaling_factor,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            state=state,
        )

    def select(self, scores_TE: Tensor) -> Tensor:
        """int64 [T, K]: the experts, by scores that have the bias."""
        return scores_TE.topk(self.top_k, dim=-1)[1]
