"""A layer over two ranks when one rank's experts get nothing: it must neither hang nor differ."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moesys.parallel.dims import ParallelDims
from moesys.parallel.mesh import build_meshes
from moesys.parallelize.experts import shard_experts
from moesys.testing.ranks import run_ranks
from tests.moe.test_layer import CONFIG, make_input, make_layer


def _forward_backward(rank: int, size: int, backend: str, ep: int):
    layer = make_layer(replace(CONFIG, top_k=1), backend)
    layer.router.selection_bias_E[0] = 100.0  # every token to expert 0
    whole = {n: p.detach().clone() for n, p in layer.experts.named_parameters()}
    if ep > 1:
        meshes = build_meshes(ParallelDims(world_size=size, ep=ep), "cpu")
        shard_experts(layer, meshes)
        for name, parameter in layer.experts.named_parameters():
            assert torch.equal(parameter.full_tensor(), whole[name])
    x = make_input()
    y, _, _ = layer(x)
    y.square().sum().backward()
    gradient = layer.experts.gate_up.grad
    gradient = gradient.full_tensor() if ep > 1 else gradient
    if ep == 1:
        dist.barrier()
    return y.detach(), x.grad, gradient


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_all_tokens_on_one_expert(backend):
    y, dx, dw = run_ranks(_forward_backward, 1, backend, 1)[0]
    assert dw[0].abs().sum() > 0
    assert dw[1:].abs().sum() == 0
    for ours in run_ranks(_forward_backward, 2, backend, 2, timeout_s=60):
        torch.testing.assert_close(ours[0], y)
        torch.testing.assert_close(ours[1], dx)
        # Both ranks fed the same tokens to the expert.
        torch.testing.assert_close(ours[2], 2 * dw, rtol=1e-5, atol=1e-5)
