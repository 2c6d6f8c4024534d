"""Ring attention against one process's attention: values, all gradients, pairs computed, bytes sent."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from moesys.parallel import ring as ring_module
from moesys.parallel.context import local_positions
from moesys.parallel.ring import Ring, RingAttention
from moesys.parallel.tile import reference_attention
from moesys.profile.traffic import TrafficCounter
from moesys.testing.ranks import run_ranks

SAMPLES, HEADS, KV_HEADS, SEQ_LEN, HEAD_DIM = 2, 4, 2, 48, 16
# Within a chunk, over a rank's border, over all ranks; and some that end where a chunk does.
DOCUMENTS = ((5, 6, 17, 40, 48), (12, 48))


def _whole(dtype):
    """q, k, v and the gradient of the output, of whole sequences."""
    draw = torch.Generator().manual_seed(1)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(SAMPLES, n, SEQ_LEN, HEAD_DIM, generator=draw).to(dtype) for n in heads]


def _share(x, rank, size):
    """Of the sequence, laid out as the model does: heads beside their dims."""
    x = x[:, :, local_positions(SEQ_LEN, rank, size)]
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _together(shares):
    """From all ranks' shares back to the sequence."""
    size = len(shares)
    held = [p for rank in range(size) for p in local_positions(SEQ_LEN, rank, size)]
    return torch.cat(shares, dim=2)[:, :, torch.tensor(held).argsort()]


def _expected(dtype, ends):
    """The output and the gradients of q, k and v in one process, from the same values in fp32."""
    *qkv, grad = (x.float() for x in _whole(dtype))
    qkv = [x.requires_grad_() for x in qkv]
    if ends is None:
        out = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    else:
        out = reference_attention(*qkv, ends)
    return out.detach(), *torch.autograd.grad(out, qkv, grad)


def _attend(rank, size, dtype, ends):
    ring = RingAttention(dist.group.WORLD)
    pairs = _count_pairs()
    q, k, v, grad = (_share(x, rank, size) for x in _whole(dtype))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with TrafficCounter() as forward:
        out = ring(q, k, v, ends)
    with TrafficCounter() as backward:
        grads = torch.autograd.grad(out, (q, k, v), grad)
    sent = [forward.total_bytes, backward.total_bytes]
    return [x.detach() for x in (out, *grads)], sent, pairs


def _count_pairs():
    """Let every kernel call of the ring note what it computes: [forward, backward], pairs times samples."""
    counts = [0, 0]

    def noting(function, index, q_at):
        def call(*args):
            q, k, is_causal = args[q_at], args[q_at + 1], args[-1]
            length = q.shape[2]
            assert not is_causal or length == k.shape[2]
            counts[index] += len(q) * (
                length * (length + 1) // 2 if is_causal else length * k.shape[2]
            )
            return function(*args)

        return call

    ring_module.attend = noting(ring_module.attend, 0, 0)
    ring_module.attend_backward = noting(ring_module.attend_backward, 1, 1)
    return counts


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("ends", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_gradients_pairs_and_bytes(size, ends, dtype, tolerance):
    results, sent, pairs = zip(*run_ranks(_attend, size, dtype, ends), strict=True)
    for shares, expected in zip(zip(*results, strict=True), _expected(dtype, ends), strict=True):
        together = _together(shares)
        assert together.dtype == dtype
        assert (together - expected).norm() <= tolerance * expected.norm()

    if ends is None:
        total = SAMPLES * SEQ_LEN * (SEQ_LEN + 1) // 2
        assert all(counts == [total // size] * 2 for counts in pairs)
    else:
        lengths = (5, 1, 11, 23, 8, 12, 36)
        total = sum(n * (n + 1) // 2 for n in lengths)
        assert [sum(counts) for counts in zip(*pairs, strict=True)] == [total, total]

    elements = 2 * SAMPLES * KV_HEADS * (SEQ_LEN // size) * HEAD_DIM
    forward = (size - 1) * elements * dtype.itemsize
    assert all(bytes_ == [forward, forward + (size - 1) * elements * 4] for bytes_ in sent)


def _alone(rank, size):
    *qkv, _ = _whole(torch.float32)
    ring = RingAttention(dist.group.WORLD)
    return ring(*qkv), F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)


def test_one_rank_computes_plain_attention():
    ((out, plain),) = run_ranks(_alone, 1)
    assert torch.equal(out, plain)


def _order(rank, size):
    """What happens in the forward pass, in order: "s" a transfer begins, "c" a tile is computed."""
    events = []
    ring = RingAttention(dist.group.WORLD)
    shift, attend = ring.ring.shift, ring_module.attend

    def noting_shift(tensors, rows):
        events.append("s")
        return shift(tensors, rows)

    def noting_attend(*args):
        events.append("c")
        return attend(*args)

    ring.ring.shift, ring_module.attend = noting_shift, noting_attend
    ring(*(_share(x, rank, size) for x in _whole(torch.float32)[:3]))
    return "".join(events)


def test_the_next_block_is_under_way_before_the_current_one_is_computed():
    assert run_ranks(_order, 4) == ["scscscc"] * 4


def _refused(rank, size):
    ring = RingAttention(dist.group.WORLD)
    q, k, v = (x[:, :, :9] for x in _whole(torch.float32)[:3])
    with TrafficCounter() as counter:
        with pytest.raises(ValueError, match=r"18 tokens .* 2 \* 2 = 4"):
            ring(q, k, v)
        with pytest.raises(ValueError, match="length of the whole sequence, 16"):
            ring(q[:, :, :8], k[:, :, :8], v[:, :, :8], ((8,), (8,)))
    return counter.total_bytes


def test_lengths_and_documents_that_do_not_fit_are_refused_before_anything_is_sent():
    assert run_ranks(_refused, 2) == [0, 0]


def _totals(rank: int, size: int) -> dict[str, list[float]]:
    own = torch.tensor([2.0**rank, 100.0 * rank])
    rings = {"all": range(size), "some": (3, 0, 4), "alone": (rank,)}
    found = {}
    for name, peers in rings.items():
        if rank in peers:
            with TrafficCounter() as counter:
                found[name] = Ring(dist.group.WORLD, peers, peers.index(rank)).total(own).tolist()
            assert counter.total_bytes == (len(peers) - 1) * own.nbytes
    return found


def test_a_ring_adds_up_what_its_ranks_have() -> None:
    found = run_ranks(_totals, 5)
    assert all(totals["all"] == [31.0, 1000.0] for totals in found)
    assert [totals.get("some") for totals in found] == [[25.0, 700.0], None, None] + [
        [25.0, 700.0]
    ] * 2
    assert [totals["alone"][0] for totals in found] == [1.0, 2.0, 4.0, 8.0, 16.0]
