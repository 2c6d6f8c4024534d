"""Gradients over replicas: summed once per optimizer step, in flat buckets, one group per mesh."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.ops.shard import local_tensor

BUCKET_BYTES = 32 << 20


def sum_over_replicas(gradients: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce (sum) the local parts of `gradients` in place over the ranks that hold the same parameters.

    The order of `gradients` decides the buckets and must be the same on every rank.
    """
    if dist.get_world_size(group) == 1:
        return
    buckets = _buckets(gradients)
    flats = [torch.cat([g.reshape(-1) for g in bucket]) for bucket in buckets]
    pending = [dist.all_reduce(flat, group=group, async_op=True) for flat in flats]
    for flat, work, bucket in zip(flats, pending, buckets, strict=True):
        assert work is not None
        work.wait()
        for gradient, reduced in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(reduced.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group neighbours of one dtype up to BUCKET_BYTES."""
    buckets: list[list[Tensor]] = []
    size_bytes = 0
    for gradient in map(local_tensor, gradients):
        nbytes = gradient.numel() * gradient.element_size()
        if (
            not buckets
            or size_bytes + nbytes > BUCKET_BYTES
            or buckets[-1][0].dtype != gradient.dtype
        ):
            buckets.append([])
            size_bytes = 0
        buckets[-1].append(gradient)
        size_bytes += nbytes
    return buckets


def lies_with_experts(name: str) -> bool:
    """Whether a parameter is of what ep ranks share out: experts, or the table of a memory layer."""
    return ".experts." in name or ".memory.table." in name
