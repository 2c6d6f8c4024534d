"""A router that remembers what the layers before it saw of the token.

Shapes: T tokens, D model, E experts, P width of the state.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.moe.routers.topk import TopKRouter
from moesys.moe.routing import RoutingResult


class RecurrentRouter(TopKRouter):
    """logits = G h, with h = GRU(V x, h of the layer before): V and G of each layer, one GRU for all of them.

        r = sigmoid(W_r v + U_r h),   z = sigmoid(W_z v + U_z h),   n = tanh(W_n v + r * U_n h)
        h' = (1 - z) * n + z * h,     h = 0 before the first layer

    Source: RMoE (2408.06793, eq. 4-6), which has `state_width` 128; the recurrence is over depth, token by token.
    The state crosses pipeline stages, and so do its gradients.
    """

    over_depth = ("gru",)

    def __init__(
        self, *, d_model: int, num_experts: int, state_width: int = 128, **options: Any
    ) -> None:
        super().__init__(d_model=d_model, num_experts=num_experts, **options)
        if state_width < 1:
            raise ValueError(f"router option state_width={state_width} must be at least 1")
        self.state_dim = state_width
        self.projection = nn.Parameter(torch.empty(state_width, d_model))
        self.weight = nn.Parameter(torch.empty(num_experts, state_width))
        self.gru = GRUCell(state_width)

    def forward(self, x_TD: Tensor, state: Tensor | None = None) -> RoutingResult:
        """`state` is h of the layer before."""
        with torch.autocast(x_TD.device.type, enabled=False):
            v_TP = F.linear(x_TD.float(), self.projection.float())
            h_TP = self.gru(v_TP, torch.zeros_like(v_TP) if state is None else state.float())
            return self.choose(self.logits(h_TP), state=h_TP)


class GRUCell(nn.Module):
    """A gated recurrent unit without biases, its matrices for r, z and n one below the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_weight = nn.Parameter(torch.empty(3 * width, width))
        self.state_weight = nn.Parameter(torch.empty(3 * width, width))

    def forward(self, v_TP: Tensor, h_TP: Tensor) -> Tensor:
        """The next h."""
        of_v = F.linear(v_TP, self.input_weight.float()).chunk(3, dim=-1)
        of_h = F.linear(h_TP, self.state_weight.float()).chunk(3, dim=-1)
        r_TP = (of_v[0] + of_h[0]).sigmoid()
        z_TP = (of_v[1] + of_h[1]).sigmoid()
        n_TP = (of_v[2] + r_TP * of_h[2]).tanh()
        return (1 - z_TP) * n_TP + z_TP * h_TP
