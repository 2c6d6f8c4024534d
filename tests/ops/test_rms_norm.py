"""The compiled RMSNorm, and torch's where that runs, beside the reference in fp64."""

import pytest
import torch
import torch.nn.functional as F

from moesys.ops import library, reference
from moesys.ops.rms_norm import rms_norm
from tests.ops.gradients import compare

pytestmark = pytest.mark.skipif(
    not library.runs_on(torch.empty(0)), reason="without compiled ops it is torch's"
)


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 3, 64), (130, 33), (0, 8), (2, 0, 8), (7, 5, 3, 16), (300, 257)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator)
    weight_D = torch.randn(shape[-1], generator=generator)
    leaves = [x.to(dtype), weight_D.to(dtype)]
    compare(rms_norm, reference.rms_norm, leaves, 0.5, rtol=1e-5, atol=2e-5)


def test_epsilon_counts_and_strides_do_not() -> None:
    x = torch.zeros(2, 4)
    x[0, 0] = 1e-3
    expected = 1e-3 / (0.25e-6 + 1e-2) ** 0.5
    assert rms_norm(x, torch.ones(4), 1e-2)[0, 0].item() == pytest.approx(expected)
    assert not rms_norm(x, torch.ones(4), 1e-2)[1].any()
    y = torch.randn(6, 10)
    assert torch.equal(
        rms_norm(y.t(), torch.ones(6), 1e-6), rms_norm(y.t().contiguous(), torch.ones(6), 1e-6)
    )


def test_other_types_are_torchs() -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    weight = torch.randn(8, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6))


def test_gradient_of_the_weight_does_not_depend_on_threads() -> None:
    x, grad = torch.randn(5000, 32), torch.randn(5000, 32)
    threads, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            weight_D = torch.ones(32, requires_grad=True)
            rms_norm(x, weight_D, 1e-6).backward(grad)
            found.append(weight_D.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("num_rows", [5, 0])
def test_opcheck(num_rows: int) -> None:
    x_ND, weight_D = torch.randn(num_rows, 9), torch.randn(9)
    torch.library.opcheck(
        torch.ops.moesys.rms_norm_backward,
        (torch.randn(num_rows, 9), x_ND, weight_D, torch.rand(num_rows)),
    )
    leaves = x_ND.clone().requires_grad_(), weight_D.clone().requires_grad_()
    torch.library.opcheck(torch.ops.moesys.rms_norm, (*leaves, 1e-6))
