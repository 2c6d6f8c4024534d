import math

import pytest
import torch

from moesys.ops import reference, swiglu
from tests.ops.gradients import compare

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 64), (7, 2 * 33), (1, 2), (0, 16), (5, 0), (3, 2 * 513)], ids=str
)
@each_device
def test_values_and_gradients(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    gate_up_N2F = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    compare(swiglu, reference.swiglu, [gate_up_N2F.to(device, dtype)])


@each_device
def test_accuracy_over_the_whole_range(device: str) -> None:
    """Within 4 units in the last place of the exact value, wherever that is a normal number."""
    gate_N = torch.linspace(-86, 100, 200_001, device=device)
    got_N = swiglu(torch.stack([gate_N, torch.ones_like(gate_N)], dim=1))[:, 0].double()
    exact_N = torch.nn.functional.silu(gate_N.double())
    error = ((got_N - exact_N) / exact_N.where(exact_N != 0, 1)).abs().max().item()
    assert error < 4 * torch.finfo(torch.float32).eps


@each_device
def test_extreme_values(device: str) -> None:
    inf, nan = math.inf, math.nan
    gate = torch.tensor([-1e30, -1e4, 1e4, 1e30, inf, nan, 0.0, -0.0], device=device)
    gate_up_N2F = torch.stack([gate, torch.ones_like(gate)], dim=1).requires_grad_()
    out_N1 = swiglu(gate_up_N2F)
    torch.testing.assert_close(out_N1, reference.swiglu(gate_up_N2F), equal_nan=True)
    out_N1[[0, 1, 2, 3, 5]].sum().backward()
    assert gate_up_N2F.grad is not None
    assert gate_up_N2F.grad[:4, 0].tolist() == [0, 0, 1, 1]
    assert gate_up_N2F.grad[5].isnan().all()


@each_device
def test_non_contiguous_input(device: str) -> None:
    gate_up_N2F = torch.randn(8, 6, device=device).t()
    assert torch.equal(swiglu(gate_up_N2F), swiglu(gate_up_N2F.contiguous()))


@each_device
def test_an_expanded_gradient(device: str) -> None:
    gate_up_N2F = torch.randn(3, 8, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(swiglu(gate_up_N2F).sum(), gate_up_N2F)
    (expected,) = torch.autograd.grad(reference.swiglu(gate_up_N2F).sum(), gate_up_N2F)
    torch.testing.assert_close(grad, expected)


def test_gradients_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(
        swiglu, torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    )


def test_the_backward_keeps_only_the_input() -> None:
    saved = []
    gate_up_N2F = torch.randn(16, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate_up_N2F)
    assert [t.data_ptr() for t in saved] == [gate_up_N2F.data_ptr()]


def test_wrong_arguments() -> None:
    for wrong in (torch.zeros(3, 5), torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"gate_up must be floating point \[N, 2F\], got"):
            swiglu(wrong)


@each_device
def test_opcheck(device: str) -> None:
    gate_up_N2F = torch.randn(5, 18, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.moesys.swiglu, (gate_up_N2F,))
    grad_NF = torch.randn(5, 9, device=device)
    torch.library.opcheck(torch.ops.moesys.swiglu_backward, (grad_NF, gate_up_N2F.detach()))
