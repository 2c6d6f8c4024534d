"""One norm over whole and sharded gradients; clipping scales them all."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moesys.optim.clip import gradient_norm, scale_gradients
from moesys.testing.ranks import run_ranks


def _gradients(rank: int, size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two replicated gradients, one sharded over ep; and all their numbers."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    experts = torch.randn(8, 4, generator=generator)
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("edp", "ep"))["ep"]
    local = experts.chunk(size // 2)[mesh.get_local_rank()].clone()
    sharded = DTensor.from_local(local, mesh, [Shard(0)])
    everything = torch.cat([g.flatten() for g in [*whole, experts]])
    return [*whole, sharded], everything


def _norm(rank: int, size: int, max_norm: float):
    gradients, everything = _gradients(rank, size)
    norm = gradient_norm(gradients, size)
    scale_gradients(gradients, norm, max_norm)
    return norm.item(), gradient_norm(gradients, size).item(), everything.norm().item()


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_the_norm_counts_each_shard_once_and_clipping_reaches_all(max_norm):
    for norm, after, expected in run_ranks(_norm, 4, max_norm):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert after == pytest.approx(min(max_norm, expected), rel=1e-5)
