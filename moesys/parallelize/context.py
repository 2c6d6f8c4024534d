"""Sequences shared out over ranks: each has an early and a late chunk of every one, and attention brings them together.

Shapes: S positions of a whole sequence, C = S / cp of this rank.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from moesys.models.transformer import Transformer
from moesys.parallel.context import local_positions
from moesys.parallel.mesh import Meshes
from moesys.parallel.pieces import PieceAttention
from moesys.parallel.ring import RingAttention
from moesys.parallel.ulysses import UlyssesAttention


def shard_context(part: Transformer, meshes: Meshes, attention: Literal["ring", "ulysses"]) -> None:
    """Let the part's attention work across the ranks of cp, on the positions that this one has."""
    core = (RingAttention if attention == "ring" else UlyssesAttention)(meshes.cp_group)
    for block in part.blocks():
        block.attn.core = core
    part.positions = slice_positions(core.rank, core.size)


def share_pieces(part: Transformer, meshes: Meshes) -> None:
    """Let the part's attention work on pieces of sequences, each across the data ranks that a plan shares it out over, and its MoE
    layers count what whole ones have."""
    core = PieceAttention(meshes.replica_group)
    for block in part.blocks():
        block.attn.core = core
    for layer in part.moe_layers():
        layer.share = layer.share._replace(data_group=meshes.replica_group)


def slice_positions(rank: int, size: int) -> Callable[[int, torch.device], Tensor]:
    """Which positions the C that this rank has are, int64 [C]."""

    @cache
    def positions(local_len: int, device: torch.device) -> Tensor:
        return torch.tensor(local_positions(local_len * size, rank, size), device=device)

    return positions


def local_slice(ids_BS: Tensor, meshes: Meshes) -> Tensor:
    """This rank's columns [B, C] of whole sequences."""
    cp = meshes.dims.cp
    if cp == 1:
        return ids_BS
    rank = torch.distributed.get_rank(meshes.cp_group)
    return ids_BS[:, slice_positions(rank, cp)(ids_BS.shape[1] // cp, ids_BS.device)]
