"""One gradient norm over parameters that live on different meshes and pipeline stages."""

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.ops.shard import local_tensor, num_shards


@torch.no_grad()
def gradient_norm(gradients: list[Tensor], stage_size: int) -> Tensor:
    """The 2-norm of all gradients together (fp64 scalar), with each element counted once.

    A pipeline stage has `stage_size` ranks; stage_size / num_shards of them hold the same shard, so each adds that part
    of its square. One all-reduce of a scalar over all ranks.
    """
    by_shards: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_shards.setdefault(num_shards(gradient), []).append(local_tensor(gradient))
    squared = [_squared_norm(held) * (n / stage_size) for n, held in by_shards.items()]
    total = torch.stack(squared).sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def scale_gradients(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Multiply by max_norm / norm where norm is above max_norm. No host sync."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_tensor(g) for g in gradients], factor)


def _squared_norm(tensors: list[Tensor]) -> Tensor:
    """fp64 sum of the tensors' squared norms, as fp32 norms are summed over thousands of tensors."""
    norms = torch.stack([n.double() for n in torch._foreach_norm(tensors)])
    return norms.square().sum()
