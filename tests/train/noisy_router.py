"""A router that draws random numbers in training, so that a resume must restore their state."""

import torch

from moesys.moe.routers import TopKRouter


class NoisyRouter(TopKRouter):
    def forward(self, x_TD, state=None):
        noise = 0.1 * torch.randn_like(x_TD) if self.training else 0.0
        return super().forward(x_TD + noise, state)
