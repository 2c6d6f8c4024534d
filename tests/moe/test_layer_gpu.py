"""The MoE layer on a GPU against itself on the CPU: values and all gradients."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.moe.test_layer import CONFIG, gradients, make_input, make_layer


def outcome(layer, x):
    y, losses, _ = layer(x)
    return y, losses, gradients(layer, x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_the_loop_in_fp32_equals_the_cpu(top_k):
    layer = make_layer(replace(CONFIG, top_k=top_k), "loop")
    x = make_input()
    y, losses, grads = outcome(layer, x)
    gpu_x = x.detach().cuda().requires_grad_()
    gpu_layer = copy.deepcopy(layer).cuda()
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).cuda()
    gpu_y, gpu_losses, _ = gpu_layer(gpu_x)
    named = dict(gpu_layer.named_parameters()) | {"x": gpu_x}
    gpu_grads = torch.autograd.grad((gpu_y * weight).sum(), list(named.values()))
    torch.testing.assert_close(gpu_y.cpu(), y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gpu_losses.total.cpu(), losses.total, rtol=1e-4, atol=1e-5)
    for name, gradient in zip(named, gpu_grads, strict=True):
        torch.testing.assert_close(gradient.cpu(), grads[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.gpu
def test_grouped_mm_in_bf16_equals_the_loop():
    results = {}
    for backend in ("loop", "grouped_mm"):
        layer = make_layer(CONFIG, backend).cuda()
        x = make_input().detach().cuda().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y, _, _ = layer(x)
        y.float().square().sum().backward()
        results[backend] = (y.float(), x.grad, layer.experts.gate_up.grad, layer.experts.down.grad)
    for ours, theirs in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_a_layer_on_one_rank_never_waits_for_the_device():
    layer = make_layer(CONFIG, "grouped_mm").cuda()
    x = make_input().detach().cuda().requires_grad_()

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y, losses, _ = layer(x)
        (y.float().square().sum() + losses.total).backward()

    step()  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
