"""Rows that travel narrower than the model is wide.

Shapes: T tokens, D model, C latent width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.ops.autocast import compute_type


class Latent(nn.Module):
    """y = up(experts(down(x))): routed experts work in C dimensions, so an exchange sends C / D of the bytes.

    Source: LatentMoE (Nemotron 3 Super; Elango et al., 2026), where the width that is saved buys more experts per token;
    megatron-core's moe_latent_size.
    """

    def __init__(self, d_model: int, d_latent: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(d_latent, d_model))
        self.up = nn.Parameter(torch.empty(d_model, d_latent))

    def enter(self, x_TD: Tensor) -> Tensor:
        """[T, C]."""
        return F.linear(x_TD, compute_type(self.down))

    def leave(self, y_TC: Tensor) -> Tensor:
        """[T, D]."""
        return F.linear(y_TC, compute_type(self.up))
