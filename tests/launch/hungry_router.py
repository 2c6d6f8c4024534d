"""A router that keeps more and more memory on one rank."""

import os

import torch

from tests.train.noisy_router import NoisyRouter

VARIABLE = "MOESYS_TEST_HUNGER"
"""Number of the task, as Slurm counts them."""
BYTES_PER_CALL = 256 << 20


class HungryRouter(NoisyRouter):
    def forward(self, x_TD, state=None):
        is_hungry = os.environ.get(VARIABLE) == os.environ.get("SLURM_PROCID")
        if is_hungry and torch.distributed.is_initialized():
            eaten = getattr(self, "eaten", [])
            self.eaten = [*eaten, torch.ones(BYTES_PER_CALL, dtype=torch.uint8)]
        return super().forward(x_TD, state)
