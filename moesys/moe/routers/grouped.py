"""Top-k within a few groups of experts, so that a token's rows go to few devices or nodes.

Shapes: T tokens, E experts, G groups of E / G experts, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor

from moesys.moe.routers.topk import TopKRouter


class GroupLimitedRouter(TopKRouter):
    """A group's score is the sum of its `group_score_top` best scores; the K best experts of the `top_groups` best groups.

    Device-limited as in DeepSeek-V2 (2405.04434, sec. 2.2.2) with softmax and `group_score_top: 1`, node-limited as in
    DeepSeek-V3 (2412.19437, sec. 2.1.2) with sigmoid and 2. Experts lie in order of rank, so with `num_groups` a
    multiple or divisor of parallel.ep a group is a device's or a node's.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        num_groups: int,
        top_groups: int,
        group_score_top: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k, **options)
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(
                f"router option num_groups={num_groups} must divide model.moe.num_experts={num_experts}"
            )
        size = num_experts // num_groups
        if not 1 <= top_groups <= num_groups:
            raise ValueError(
                f"router option top_groups={top_groups} must be in 1..num_groups={num_groups}"
            )
        if top_groups * size < top_k:
            raise ValueError(
                f"router option top_groups={top_groups} gives a token {top_groups * size} experts to choose from, "
                f"fewer than model.moe.top_k={top_k}: raise top_groups or lower num_groups={num_groups}"
            )
        if not 1 <= group_score_top <= size:
            raise ValueError(
                f"router option group_score_top={group_score_top} must be in 1..{size}, the experts of a group"
            )
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.group_score_top = group_score_top

    def select(self, scores_TE: Tensor) -> Tensor:
        scores_TGe = scores_TE.unflatten(1, (self.num_groups, -1))
        group_scores_TG = scores_TGe.topk(self.group_score_top, dim=-1)[0].sum(-1)
        groups_Tg = group_scores_TG.topk(self.top_groups, dim=-1, sorted=False)[1]
        is_open_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter_(
            1, groups_Tg, True
        )
        open_TGe = scores_TGe.masked_fill(~is_open_TG[:, :, None], float("-inf"))
        return super().select(open_TGe.flatten(1))
