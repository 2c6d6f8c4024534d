"""What part of a tensor this rank has: all of a plain one, its shard of a DTensor. A shard's rows of dim 0 may be any."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's storage, differentiable: the gradient of a shard is a shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and shape, inside of a whole."""


def set_rows(tensor: DTensor, rows: Sequence[int]) -> None:
    """Say that this rank's shard, of dim 0, is these rows of the whole, in ascending order: as many and those that it
    likes, in the place of an equal run. All that torch does element by element stays right."""
    assert all(a < b for a, b in pairwise(rows)), f"{rows} are not in ascending order"
    tensor._rows = tuple(rows)  # type: ignore[attr-defined]


def set_rows_like(tensor: Tensor, other: Tensor) -> None:
    """Say that `tensor`, made of `other`, has its rows."""
    if (rows := said_rows(other)) is not None:
        tensor._rows = rows  # type: ignore[attr-defined]


def detached(tensor: Tensor) -> Tensor:
    """The same storage and rows, outside of autograd."""
    result = tensor.detach()
    set_rows_like(result, tensor)
    return result


def said_rows(tensor: Tensor) -> tuple[int, ...] | None:
    """As said by `set_rows`, by all ranks that have a part or by none."""
    return getattr(tensor, "_rows", None)


def local_rows(tensor: Tensor) -> Sequence[int]:
    """Of dim 0, the rows of which this rank has all or a part, in order of its storage."""
    if (rows := said_rows(tensor)) is not None:
        return rows
    box = local_box(tensor)
    assert box is not None, f"{tensor.shape}: this rank's part is no box of the whole"
    (first, *_), (length, *_) = box
    return range(first, first + length)


def local_boxes(tensor: Tensor) -> list[Box] | None:
    """As `local_box`; of rows that are no run, the boxes of their runs, one after the other along dim 0 of the storage."""
    rows = said_rows(tensor)
    if rows is None:
        box = local_box(tensor)
        return None if box is None else [box]
    assert isinstance(tensor, DTensor)
    shape, offsets = _place(tensor)
    begins = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    lengths = [end - begin for begin, end in pairwise((*begins, len(rows)))]
    return [
        ((rows[begin], *offsets[1:]), (length, *shape[1:]))
        for begin, length in zip(begins, lengths, strict=True)
    ]


def local_box(tensor: Tensor) -> Box | None:
    """Offsets and shape, inside the whole, of what this rank has; None if that is no box.

    It is none with a pending sum, or with rows taken in strides. A rank outside of the mesh has the box of no elements.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    if not _is_box(tensor):
        return None
    shape, offsets = _place(tensor)
    if len(offsets) != tensor.ndim:
        return (0,) * tensor.ndim, (0,) * tensor.ndim
    return offsets, shape


def _place(tensor: DTensor) -> Box:
    """Shape and offsets, by torch's equal runs."""
    shape, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(shape), tuple(offsets)


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
