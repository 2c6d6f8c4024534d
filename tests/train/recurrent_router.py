"""A router that hands a state on from layer to layer, with a loss of its own.

Shapes: T tokens, D model, R numbers of the state.
"""

from dataclasses import replace

import torch
from torch import nn

from moesys.moe.routers import TopKRouter


class RecurrentRouter(TopKRouter):
    """s = tanh(read x + carry s'), of the layer before; routes x + mix s. The first router has no s'."""

    state_dim = 4

    def __init__(self, *, d_model, **options) -> None:
        super().__init__(d_model=d_model, **options)
        self.read = nn.Parameter(torch.empty(self.state_dim, d_model))
        self.carry = nn.Parameter(torch.empty(self.state_dim, self.state_dim))
        self.mix = nn.Parameter(torch.empty(d_model, self.state_dim))

    def forward(self, x_TD, state=None):
        with torch.autocast(x_TD.device.type, enabled=False):
            state_TR = x_TD.float() @ self.read.t()
            if state is not None:
                # In this order the gradient of the state is not contiguous.
                state_TR = state_TR + (self.carry @ state.t()).t()
            state_TR = state_TR.tanh()
            routed = super().forward(x_TD.float() + state_TR @ self.mix.t())
        return replace(routed, extra_loss=0.02 * state_TR.square().mean(), state=state_TR)
