"""The product per expert, compiled and torch's, beside the reference in fp64.

Shapes: R rows, L experts, I inputs, O outputs.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesys.ops import library, reference
from moesys.ops.grouped_linear import GroupedBackend, grouped_linear

pytestmark = pytest.mark.skipif(
    not library.runs_on(torch.empty(0)), reason="without compiled ops the loop is torch's"
)
ops = torch.ops.moesys


def operands(counts: list[int], inputs: int, outputs: int, spare: int) -> tuple[Tensor, ...]:
    """Rows (`spare` more than the experts have, all NaN), weight, counts, gradient."""
    generator = torch.Generator().manual_seed(len(counts) + inputs)
    num_rows = sum(counts)
    rows_RI = torch.randn(num_rows + spare, inputs, generator=generator)
    weight_LOI = torch.randn(len(counts), outputs, inputs, generator=generator)
    grad_RO = torch.randn(num_rows + spare, outputs, generator=generator)
    rows_RI[num_rows:] = grad_RO[num_rows:] = torch.nan
    return rows_RI, weight_LOI, torch.tensor(counts), grad_RO


def compare(
    counts: list[int],
    inputs: int,
    outputs: int,
    spare: int = 0,
    backend: GroupedBackend = "loop",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Values and both gradients, to the rounding of sums of that length in fp32; not of `spare` rows."""
    rows_RI, weight_LOI, counts_L, grad_RO = operands(counts, inputs, outputs, spare)
    leaves = rows_RI.to(dtype).requires_grad_(), weight_LOI.to(dtype).requires_grad_()
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    grad_RO = grad_RO.to(dtype)
    out_RO = grouped_linear(*leaves, counts_L, backend)
    exact_out_RO = reference.grouped_linear(exact[0], exact[1], counts_L)
    grads = torch.autograd.grad(out_RO, leaves, grad_RO)
    exact_grads = torch.autograd.grad(exact_out_RO, exact, grad_RO.double())
    used = slice(0, sum(counts))
    for got, want, length in (
        (out_RO[used], exact_out_RO[used], inputs),
        (grads[0][used], exact_grads[0][used], outputs),
        (grads[1], exact_grads[1], max(counts)),
    ):
        assert got.dtype == dtype
        rtol, atol = max(1e-5, torch.finfo(dtype).eps), 2e-6 * length**0.5 + 1e-6
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


# Rows per expert around the tile of 6 and the block of 512; widths around vectors of 16, panels of 64, depth 512.
@pytest.mark.parametrize("counts", [[1], [6, 0, 7, 5], [13, 1, 3], [0, 0], [515, 2, 1030]], ids=str)
@pytest.mark.parametrize(
    "width", [(16, 64), (1, 1), (65, 15), (130, 33), (513, 80), (20, 1040)], ids=str
)
def test_values_and_gradients(counts: list[int], width: tuple[int, int]) -> None:
    compare(counts, *width, spare=0 if sum(counts) else 1)


# In fp64 and bf16 the loop is torch's; grouped_mm takes no fp64.
BACKENDS = [
    ("loop", torch.float32),
    ("loop", torch.float64),
    ("loop", torch.bfloat16),
    ("grouped_mm", torch.float32),
    ("grouped_mm", torch.bfloat16),
]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
@pytest.mark.parametrize("counts", [[6, 0, 7, 5], [0, 0], [40]], ids=str)
@pytest.mark.parametrize("spare", [0, 5])
def test_each_backend(
    counts: list[int], spare: int, backend: GroupedBackend, dtype: torch.dtype
) -> None:
    """Experts without rows, no rows at all, and rows past the counts, which are not read."""
    compare(counts, 24, 40, spare, backend, dtype)


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 90),
)
def test_any_shape(counts: list[int], inputs: int, outputs: int) -> None:
    compare(counts, inputs, outputs, spare=1)


def test_bit_equal_whatever_the_threads() -> None:
    rows_RI, weight_LOI, counts_L, grad_RO = operands([900, 3, 0, 70], 70, 130, spare=0)
    threads = torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2, 3, 3):
            torch.set_num_threads(num_threads)
            found.append(
                (
                    ops.grouped_linear(rows_RI, weight_LOI, counts_L),
                    ops.grouped_linear_grad_rows(grad_RO, weight_LOI, counts_L),
                    ops.grouped_linear_grad_weight(grad_RO, rows_RI, counts_L),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_strided_operands_and_gradients_that_are_not_needed() -> None:
    rows_RI, weight_LOI, counts_L, _ = operands([4, 8], 32, 48, spare=0)
    plain = grouped_linear(rows_RI, weight_LOI, counts_L, "loop")
    strided = grouped_linear(
        rows_RI.t().contiguous().t(), weight_LOI.mT.contiguous().mT, counts_L, "loop"
    )
    assert torch.equal(plain, strided)
    weight_LOI.requires_grad_()
    # A gradient of stride 0, and none for the rows.
    grouped_linear(rows_RI, weight_LOI, counts_L, "loop").sum().backward()
    assert rows_RI.grad is None
    expected_LI = torch.stack([rows_RI[:4].sum(0), rows_RI[4:].sum(0)])
    assert weight_LOI.grad is not None
    torch.testing.assert_close(weight_LOI.grad, expected_LI[:, None].expand_as(weight_LOI))


@pytest.mark.parametrize("counts", [[5, 8], [-1, 3], [12]], ids=str)
def test_counts_that_do_not_fit_are_refused(counts: list[int]) -> None:
    rows_RI, weight_LOI, _, _ = operands([6, 6], 8, 8, spare=0)
    with pytest.raises(RuntimeError, match="tokens_per_expert must be"):
        grouped_linear(rows_RI, weight_LOI, torch.tensor(counts), "loop")


@pytest.mark.parametrize("counts", [[3, 0, 9], [0, 0]], ids=str)
def test_opcheck(counts: list[int]) -> None:
    rows_RI, weight_LOI, counts_L, grad_RO = operands(counts, 24, 40, spare=0)
    needed = rows_RI.clone().requires_grad_(), weight_LOI.clone().requires_grad_()
    torch.library.opcheck(ops.grouped_linear, (*needed, counts_L))
    torch.library.opcheck(ops.grouped_linear_grad_rows, (grad_RO, weight_LOI, counts_L))
    torch.library.opcheck(ops.grouped_linear_grad_weight, (grad_RO, rows_RI, counts_L))
