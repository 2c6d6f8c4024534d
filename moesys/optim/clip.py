"""One gradient norm over parameters that live on different meshes."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesys.parallel.gradients import local_tensor


@torch.no_grad()
def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together (fp32 scalar): sharded ones count each shard once.

    One all-reduce of a scalar per mesh on which something is sharded.
    """
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    squared = _squared_norm(whole) if whole else torch.zeros((), device=gradients[0].device)
    by_mesh: dict[object, list[DTensor]] = {}
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            by_mesh.setdefault(gradient.device_mesh, []).append(gradient)
    for sharded in by_mesh.values():
        shard_squared = _squared_norm([local_tensor(g) for g in sharded])
        dist.all_reduce(shard_squared, group=sharded[0].device_mesh.get_group())
        squared = squared + shard_squared
    return squared.sqrt()


@torch.no_grad()
def scale_gradients(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Multiply by max_norm / norm where norm is above max_norm. No host sync."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_tensor(g) for g in gradients], factor)


def _squared_norm(tensors: list[Tensor]) -> Tensor:
    """fp64 sum of the tensors' squared norms, as fp32 norms are summed over thousands of tensors."""
    norms = torch.stack([n.double() for n in torch._foreach_norm(tensors)])
    return norms.square().sum()
