"""An op against its reference: values and every gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compare(
    op: Callable,
    expected: Callable,
    leaves: list[Tensor],
    *rest: Any,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Of all `leaves`, against `expected` in fp64; to the accuracy of the types if no other is given."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, exact_out = op(*leaves, *rest), expected(*exact, *rest)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(exact_out.shape, generator=generator).to(out)
    grads = torch.autograd.grad(out, leaves, grad)
    exact_grads = torch.autograd.grad(exact_out, exact, grad.double())
    for got, want in zip([out, *grads], [exact_out, *exact_grads], strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=atol)
