"""What part of a tensor this rank has: all of a plain one, its shard of a DTensor."""

import math

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's storage, differentiable: the gradient of a shard is a shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offsets and shape, inside the whole, of what this rank has; None if that is no box.

    It is none with a pending sum, or with rows taken in strides. A rank outside of the mesh has the box of no elements.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    if not _is_box(tensor):
        return None
    shape, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if len(offsets) != tensor.ndim:
        return (0,) * tensor.ndim, (0,) * tensor.ndim
    return tuple(offsets), tuple(shape)


def num_shards(tensor: Tensor) -> int:
    """Into how many parts the ranks of one mesh cut the tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(
        tensor.device_mesh.size(axis)
        for axis, placement in enumerate(tensor.placements)
        if isinstance(placement, Shard | _StridedShard)
    )


def _is_box(tensor: DTensor) -> bool:
    """Shard and Replicate give boxes. So does FSDP over TP: its strides are undone by the later mesh axes."""
    mesh, placements = tensor.device_mesh, tensor.placements
    for axis, placement in enumerate(placements):
        if isinstance(placement, Partial):
            return False
        if isinstance(placement, _StridedShard):
            later = range(axis + 1, mesh.ndim)
            sizes = [mesh.size(a) for a in later if placements[a] == Shard(placement.dim)]
            if math.prod(sizes) != placement.split_factor:
                return False
    return True
