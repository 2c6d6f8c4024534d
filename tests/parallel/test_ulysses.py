"""Ulysses attention against one process's attention: values, all gradients, bytes sent; its order of positions."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from moesys.parallel.context import local_positions
from moesys.parallel.tile import reference_attention
from moesys.parallel.ulysses import UlyssesAttention, check_heads, in_order, in_shares
from moesys.profile.traffic import TrafficCounter
from moesys.testing.ranks import run_ranks

SAMPLES, HEADS, SEQ_LEN, HEAD_DIM = 2, 8, 48, 16
DOCUMENTS = ((5, 6, 17, 40, 48), (12, 48))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_become_whole_sequences_and_back(size):
    x = torch.randn(2, 3, 24, 4)
    shares = torch.stack([x[:, :, local_positions(24, rank, size)] for rank in range(size)])
    assert torch.equal(in_order(shares), x)
    assert torch.equal(in_shares(x, size), shares)


def _whole(num_kv_heads, dtype):
    """q, k, v and the gradient of the output, of whole sequences."""
    draw = torch.Generator().manual_seed(1)
    heads = (HEADS, num_kv_heads, num_kv_heads, HEADS)
    return [torch.randn(SAMPLES, n, SEQ_LEN, HEAD_DIM, generator=draw).to(dtype) for n in heads]


def _attend(rank, size, num_kv_heads, dtype, ends):
    ulysses = UlyssesAttention(dist.group.WORLD)
    positions = local_positions(SEQ_LEN, rank, size)
    q, k, v, grad = (x[:, :, positions] for x in _whole(num_kv_heads, dtype))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with TrafficCounter() as forward:
        out = ulysses(q, k, v, ends)
    with TrafficCounter() as backward:
        grads = torch.autograd.grad(out, (q, k, v), grad)
    sent = [forward.total_bytes, backward.total_bytes]
    return [x.detach() for x in (out, *grads)], sent


@pytest.mark.parametrize(
    ("size", "num_kv_heads", "dtype", "ends"),
    [
        (1, 2, torch.float32, None),
        (2, 4, torch.float32, None),
        (2, 8, torch.float32, DOCUMENTS),
        (4, 4, torch.float32, DOCUMENTS),
        (4, 2, torch.float32, None),  # each key/value head is read by two ranks
        (4, 1, torch.float32, DOCUMENTS),
        (4, 2, torch.bfloat16, DOCUMENTS),
    ],
)
def test_values_gradients_and_bytes(size, num_kv_heads, dtype, ends):
    results, sent = zip(*run_ranks(_attend, size, num_kv_heads, dtype, ends), strict=True)
    *qkv, grad = (x.float() for x in _whole(num_kv_heads, dtype))
    qkv = [x.requires_grad_() for x in qkv]
    if ends is None:
        out = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    else:
        out = reference_attention(*qkv, ends)
    expected = (out, *torch.autograd.grad(out, qkv, grad))
    held = torch.tensor([p for rank in range(size) for p in local_positions(SEQ_LEN, rank, size)])
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    for shares, want in zip(zip(*results, strict=True), expected, strict=True):
        together = torch.cat(shares, dim=2)[:, :, held.argsort()]
        assert together.dtype == dtype
        assert (together - want).norm() <= tolerance * want.norm()

    heads = 2 * HEADS + 2 * max(num_kv_heads, size)
    one_way = (size - 1) * heads * SAMPLES * (SEQ_LEN // size) * HEAD_DIM * dtype.itemsize // size
    assert all(bytes_ == [one_way, one_way] for bytes_ in sent)


def _alone(rank, size):
    *qkv, _ = _whole(2, torch.float32)
    ulysses = UlyssesAttention(dist.group.WORLD)
    return ulysses(*qkv), F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)


def test_one_rank_computes_plain_attention():
    ((out, plain),) = run_ranks(_alone, 1)
    assert torch.equal(out, plain)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "message"),
    [
        (6, 2, "num_heads=6 .* 4 ranks"),
        (12, 3, "num_kv_heads=3 .* 4 ranks"),
        (24, 6, "num_kv_heads=6"),
    ],
)
def test_heads_that_do_not_share_out_are_refused(num_heads, num_kv_heads, message):
    with pytest.raises(ValueError, match=message):
        check_heads(num_heads, num_kv_heads, 4)


def _refused(rank, size):
    ulysses = UlyssesAttention(dist.group.WORLD)
    q, k, v = (x[:, :, :9] for x in _whole(2, torch.float32)[:3])
    with TrafficCounter() as counter:
        with pytest.raises(ValueError, match=r"18 tokens .* 2 \* 2 = 4"):
            ulysses(q, k, v)
        q, k, v = (x[:, :, :8] for x in (q, k, v))
        with pytest.raises(ValueError, match="num_heads=7"):
            ulysses(q[:, :7], k, v)
        with pytest.raises(ValueError, match="length of the whole sequence, 16"):
            ulysses(q, k, v, ((8,), (8,)))
    return counter.total_bytes


def test_what_does_not_fit_is_refused_before_anything_is_sent():
    assert run_ranks(_refused, 2) == [0, 0]
