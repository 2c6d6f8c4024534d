"""Rotary position embedding (2104.09864), in the half-split convention of Llama and transformers.

Shapes: B sequences, S positions, N heads, H head dim.
"""

import torch
from torch import Tensor


def rope_tables(positions_S: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """fp32 cos and sin tables [S, H]; pair (i, i + H/2) turns by position / theta^(2i/H)."""
    device = positions_S.device
    inv_frequency = theta ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle = torch.outer(positions_S.float(), inv_frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def apply_rope(x_BNSH: Tensor, tables_SH: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate q or k; keeps the dtype."""
    cos_SH, sin_SH = (table.to(x_BNSH.dtype) for table in tables_SH)
    first, second = x_BNSH.chunk(2, dim=-1)
    return x_BNSH * cos_SH + torch.cat([-second, first], dim=-1) * sin_SH
