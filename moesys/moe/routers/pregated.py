"""Routing that is known before its layer.

Shapes: T tokens, D model, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.moe.routers.topk import TopKRouter
from moesys.moe.routing import RoutingResult


class PreGatedRouter(TopKRouter):
    """A layer's logits are made by the layer before, from that layer's input; the first layer makes its own too.

    So what travels where is known one layer ahead, and experts can be fetched, or sizes told, in time. Sources:
    Pre-gated MoE (2308.12066, sec. 4.1), Read-ME (2410.19123, sec. 3: routing apart from the layers it routes).
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_experts: int,
        layer: int = 0,
        num_layers: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(d_model=d_model, num_experts=num_experts, **options)
        # The weights that are not used would never see a gradient.
        if layer > 0:
            self.register_parameter("weight", None)
        has_next = layer < num_layers - 1
        self.next_weight = nn.Parameter(torch.empty(num_experts, d_model)) if has_next else None
        self.state_dim = num_experts

    def forward(self, x_TD: Tensor, state: Tensor | None = None) -> RoutingResult:
        """`state` is this layer's logits."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if state is None:
                state = self.logits(x_TD)
            ahead_TE = torch.zeros_like(state)
            if self.next_weight is not None:
                ahead_TE = F.linear(x_TD, self.next_weight.float())
            return self.choose(state, state=ahead_TE)
