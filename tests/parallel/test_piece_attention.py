"""Attention over pieces of sequences against one process: values, all gradients, bytes sent, in any plan.

Shapes: S sequences, T tokens of a rank.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from moesys.parallel.pieces import PieceAttention
from moesys.plan.batch.local import LocalPiece, LocalPieces
from moesys.plan.batch.plan import Piece, of_rank
from moesys.profile.traffic import TrafficCounter
from moesys.testing.ranks import run_ranks

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def random_step(seed, size):
    """Sequences of 1 to some hundred tokens, each on any of the ranks in any order, and three on all of them, with others between."""
    rng = np.random.default_rng(seed)
    lengths_S = np.array(
        [*(rng.exponential(size=7) ** 2 * 40 + 1).astype(np.int64), 301, 3, 77, size - 1 or 1]
    )
    pieces = [
        Piece(s, tuple(rng.permutation(size)[: rng.integers(1, size + 1)].tolist()))
        for s in rng.permutation(7).tolist()
    ]
    return lengths_S, (
        *pieces[:4],
        Piece(7, tuple(range(size))),
        *pieces[4:],
        Piece(8, (size - 1,)),
        Piece(9, tuple(range(size))),
        Piece(10, tuple(range(size))),
    )


def whole(lengths_S, dtype):
    """q, k, v and the gradient of the output, of all sequences one behind the other."""
    draw = torch.Generator().manual_seed(1)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    shape = int(lengths_S.sum()), HEAD_DIM
    return [torch.randn(1, n, *shape, generator=draw).to(dtype) for n in heads]


def held(step, lengths_S, rank):
    """Where a rank's tokens are among those of all sequences."""
    firsts = np.cumsum(lengths_S) - lengths_S
    local = LocalPieces.of_plan(step, lengths_S, rank)
    mine = [firsts[piece.sequence] for piece in of_rank(step, rank)]
    sizes = [piece.num_tokens for piece in local.pieces]
    return local, torch.from_numpy(local.positions_T() + np.repeat(mine, sizes).astype(np.int64))


def _attend(rank, size, seed, dtype):
    lengths_S, step = random_step(seed, size)
    local, at_T = held(step, lengths_S, rank)
    q, k, v, grad = (x[:, :, at_T] for x in whole(lengths_S, dtype))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with TrafficCounter() as forward:
        out = PieceAttention(dist.group.WORLD)(q, k, v, local)
    with TrafficCounter() as backward:
        grads = torch.autograd.grad(out, (q, k, v), grad)
    return [x.detach() for x in (out, *grads)], forward.total_bytes, backward.total_bytes


def expected(lengths_S, dtype):
    *qkv, grad = (x.float().split(lengths_S.tolist(), 2) for x in whole(lengths_S, dtype))
    found = []
    for q, k, v, g in zip(*qkv, grad, strict=True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, g)])
    return [torch.cat(parts, 2) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(("size", "seed"), [(1, 0), (2, 1), (3, 2), (4, 3), (4, 4), (8, 5)])
def test_any_plan_gives_one_process_values_and_gradients(size, seed, dtype, tolerance):
    lengths_S, step = random_step(seed, size)
    results, forwards, backwards = zip(*run_ranks(_attend, size, seed, dtype), strict=True)
    at = torch.cat([held(step, lengths_S, rank)[1] for rank in range(size)])
    assert sorted(at.tolist()) == list(range(lengths_S.sum()))
    for shares, one in zip(zip(*results, strict=True), expected(lengths_S, dtype), strict=True):
        together = torch.empty_like(one)
        together[:, :, at] = torch.cat(shares, 2).float()
        assert (together - one).norm() <= tolerance * one.norm()
    # A block passes all ranks but its own; what has no tokens is not sent.
    passed = sum(int(lengths_S[p.sequence]) * (len(p.ranks) - 1) for p in step)
    elements = passed * 2 * KV_HEADS * HEAD_DIM
    assert sum(forwards) == elements * dtype.itemsize
    assert sum(backwards) == elements * (dtype.itemsize + 4)


def _opposed(rank, size):
    """Rings in which the same ranks follow each other in different orders, and one that shares a rank with each."""
    step = [
        Piece(0, (0, 1, 2)),
        Piece(1, (2, 1, 0)),
        Piece(2, (3, 0)),
        Piece(3, (1, 3, 2)),
        Piece(4, (2, 0)),
    ]
    lengths_S = np.array([50, 61, 17, 33, 90])
    local, at_T = held(step, lengths_S, rank)
    q, k, v, grad = (x[:, :, at_T].requires_grad_() for x in whole(lengths_S, torch.float32))
    torch.autograd.grad(PieceAttention(dist.group.WORLD)(q, k, v, local), (q, k, v), grad)
    return True


def test_rings_that_cross_each_other_all_end():
    assert run_ranks(_opposed, 4) == [True] * 4


def _nothing(rank, size):
    lengths_S = np.array([20])
    local, at_T = held([Piece(0, (1,))], lengths_S, rank)
    q, k, v, grad = (x[:, :, at_T].requires_grad_() for x in whole(lengths_S, torch.float32))
    core = PieceAttention(dist.group.WORLD)
    out = core(q, k, v, local)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    with pytest.raises(ValueError, match=r"pieces of 7 rows were given for (0|20) queries"):
        core(q, k, v, LocalPieces((LocalPiece(7, (rank,), 0),)))
    return [tuple(x.shape) for x in (out, *grads)]


def test_a_rank_may_have_nothing():
    shapes = [[(1, n, t, HEAD_DIM) for n in (HEADS, HEADS, KV_HEADS, KV_HEADS)] for t in (0, 20)]
    assert run_ranks(_nothing, 2) == shapes


def _messages(rank, size, lengths):
    step = [Piece(sequence, (1, 0, 2)) for sequence in range(len(lengths))]
    lengths_S = np.array(lengths)
    local, at_T = held(step, lengths_S, rank)
    q, k, v, grad = (x[:, :, at_T].requires_grad_() for x in whole(lengths_S, torch.float32))
    with TrafficCounter() as counter:
        out = PieceAttention(dist.group.WORLD)(q, k, v, local)
        torch.autograd.grad(out, (q, k, v), grad)
    return sum(traffic.calls for traffic in counter.sent.values())


def test_sequences_on_the_same_ranks_go_around_as_one():
    assert run_ranks(_messages, 3, [40, 17, 2, 60]) == run_ranks(_messages, 3, [119])


def test_what_a_rank_has_is_in_the_plans_order():
    step = (Piece(1, (1, 0)), Piece(0, (0,)), Piece(2, (2,)))
    local = LocalPieces.of_plan(step, np.array([3, 8, 5]), 0)
    assert local.pieces == (LocalPiece(8, (1, 0), 1), LocalPiece(3, (0,), 0))
    assert local.rows == [slice(0, 4), slice(4, 7)]
    assert local.num_tokens == 7
    assert local.positions_T().tolist() == [2, 3, 4, 5, 0, 1, 2]


def test_what_is_on_the_same_ranks_comes_together():
    step = (Piece(0, (0,)), Piece(1, (1, 0)), Piece(2, (0, 1)), Piece(3, (0,)), Piece(4, (1, 0)))
    assert [piece.sequence for piece in of_rank(step, 0)] == [0, 3, 1, 4, 2]
    assert [piece.sequence for piece in of_rank(step, 1)] == [1, 4, 2]
