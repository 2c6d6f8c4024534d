"""Sums over replicas, in buckets."""

import pytest
import torch
import torch.distributed as dist

from moesys.parallel import gradients
from moesys.testing.ranks import run_ranks


def _reduce(rank: int, size: int, bucket_bytes: int):
    gradients.BUCKET_BYTES = bucket_bytes
    tensors = [
        torch.full((3, 4), float(rank)),
        torch.ones(5, dtype=torch.float64) * rank,
        torch.arange(7.0) + rank,
        torch.zeros(0),
        torch.full((1,), 2.0),
    ]
    gradients.sum_over_replicas(tensors, dist.group.WORLD)
    return tensors


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20])
def test_every_gradient_is_summed_whatever_the_buckets(bucket_bytes):
    for tensors in run_ranks(_reduce, 3, bucket_bytes):
        expected = [
            torch.full((3, 4), 3.0),
            torch.full((5,), 3.0, dtype=torch.float64),
            3 * torch.arange(7.0) + 3,
            torch.zeros(0),
            torch.full((1,), 6.0),
        ]
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
