"""Attention over one tile, merging of tiles, and their gradients, against the reference and plain attention."""

import pytest
import torch
import torch.nn.functional as F

from moesys.parallel.tile import (
    attend,
    attend_backward,
    merge_,
    reference_attend,
    reference_attend_backward,
    reference_attention,
)

KERNELS = [(attend, attend_backward), (reference_attend, reference_attend_backward)]


def _random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)]
)
def test_the_kernel_is_the_reference(num_kv_heads, is_causal, dtype, tolerance):
    q, grad = (_random(2, 6, 24, 16, dtype=dtype) for _ in range(2))
    k, v = (_random(2, num_kv_heads, 24 if is_causal else 40, 16, dtype=dtype) for _ in range(2))
    out, lse = attend(q, k, v, is_causal)
    expected_out, expected_lse = reference_attend(q, k, v, is_causal)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=10 * tolerance)
    # The log-sum-exp of more keys than the tile's: every share shrinks by the same factor.
    saved = (grad, q, k, v, out, lse + 0.5)
    for got, expected in zip(
        attend_backward(*saved, is_causal),
        reference_attend_backward(*saved, is_causal),
        strict=True,
    ):
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("backward", [pair[1] for pair in KERNELS])
def test_the_gradient_is_that_of_plain_attention(backward):
    q, k, v = (_random(2, n, 16, 8, dtype=torch.float64).requires_grad_() for n in (4, 2, 2))
    grad = _random(2, 4, 16, 8, dtype=torch.float64)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    q, k, v = (x.detach() for x in (q, k, v))
    _, lse = reference_attend(q, k, v, True)
    for got, want in zip(backward(grad, q, k, v, out.detach(), lse, True), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("forward", "backward"), KERNELS)
def test_tiles_of_keys_merge_to_attention_over_all(forward, backward):
    """In any order, with sums of very different size, and their gradients add up."""
    q, grad = _random(2, 4, 8, 16) * 8, _random(2, 4, 8, 16)
    k, v = _random(2, 4, 30, 16), _random(2, 4, 30, 16)
    expected, _ = reference_attend(q.double(), k.double(), v.double(), False)
    out, lse = torch.zeros_like(q), torch.full((2, 4, 8), -torch.inf)
    cuts = [slice(20, 30), slice(0, 1), slice(1, 20)]
    for cut in cuts:
        merge_(out, lse, *forward(q, k[:, :, cut], v[:, :, cut], False))
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=1e-5)
    parts = [backward(grad, q, k[:, :, c], v[:, :, c], out, lse, False) for c in cuts]
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected_grads = torch.autograd.grad(F.scaled_dot_product_attention(*wide), wide, grad.double())
    in_order = (1, 2, 0)
    got = (
        sum(part[0] for part in parts),
        *(torch.cat([parts[i][j] for i in in_order], dim=2) for j in (1, 2)),
    )
    for g, e in zip(got, expected_grads, strict=True):
        assert (g - e).norm() <= 1e-5 * e.norm()


def test_the_definition_with_documents_is_each_document_alone():
    q, k, v = (_random(2, n, 12, 8) for n in (4, 2, 2))
    out = reference_attention(q, k, v, ((5, 12), (12,)))
    for sample, begin, end in [(0, 0, 5), (0, 5, 12), (1, 0, 12)]:
        one = [x[sample : sample + 1, :, begin:end] for x in (q, k, v)]
        alone = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out[sample : sample + 1, :, begin:end], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gpu_kernel_is_the_reference(is_causal, dtype):
    q, grad = (_random(2, 4, 256, 64, dtype=dtype).cuda() for _ in range(2))
    k, v = (_random(2, 2, 256, 64, dtype=dtype).cuda() for _ in range(2))
    out, lse = attend(q, k, v, is_causal)
    torch.testing.assert_close((out, lse), reference_attend(q, k, v, is_causal), rtol=0, atol=2e-2)
    saved = (grad, q, k, v, out, lse + 0.5)
    expected_grads = reference_attend_backward(*saved, is_causal)
    for got, expected in zip(attend_backward(*saved, is_causal), expected_grads, strict=True):
        assert (got - expected).norm() <= 2e-2 * expected.norm()
