"""Into and out of regions of cut matrices, against the whole matrices on one rank; what is kept, sent and computed.

Shapes: T tokens, D model, O outputs of a rank.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.graph import get_gradient_edge
from torch.utils.flop_counter import FlopCounterMode

from moesys.parallel.tensor import TensorParallel
from moesys.profile.traffic import TrafficCounter
from moesys.testing.ranks import run_ranks

TOKENS, WIDTH, OUTPUTS = 12, 8, (4, 6)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole(size: int):
    """All tokens and all ranks' matrices, [ranks][matrices]."""
    x_TD = draw(0, TOKENS, WIDTH)
    weights = [
        [draw(9 * rank + i + 1, o, WIDTH) for i, o in enumerate(OUTPUTS)] for rank in range(size)
    ]
    return x_TD, weights


def through(rank: int, size: int, sequence_parallel: bool, keep_gathered: bool):
    """Outputs, gradients of the rank's tokens and matrices, bytes that autograd keeps, all for one loss."""
    tp = TensorParallel(dist.group.WORLD, sequence_parallel)
    x_TD, weights = whole(size)
    x = x_TD.chunk(size)[rank].clone() if sequence_parallel else x_TD
    x.requires_grad_()
    own = [weight.requires_grad_() for weight in weights[rank]]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = tp.project(x, *own, keep_gathered=keep_gathered)
    sum(((i + 1) * y.square()).sum() for i, y in enumerate(outputs)).backward()
    kept_rows = kept[0].shape[0]
    return [y.detach() for y in outputs], x.grad, [w.grad for w in own], kept_rows


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("keep_gathered", [False, True])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_projection_is_the_whole_matrices(size, sequence_parallel, keep_gathered):
    found = run_ranks(through, size, sequence_parallel, keep_gathered)
    x_TD, weights = whole(size)
    x_TD.requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for rank, own in enumerate(weights):
        outputs = [F.linear(x_TD, weight.requires_grad_()) for weight in own]
        torch.testing.assert_close(found[rank][0], [y.detach() for y in outputs])
        loss = loss + sum(((i + 1) * y.square()).sum() for i, y in enumerate(outputs))
    loss.backward()
    assert x_TD.grad is not None
    gradients = x_TD.grad.chunk(size) if sequence_parallel else [x_TD.grad] * size
    for rank, own in enumerate(weights):
        torch.testing.assert_close(found[rank][1], gradients[rank])
        torch.testing.assert_close(found[rank][2], [weight.grad for weight in own])
        share = sequence_parallel and not keep_gathered
        assert found[rank][3] == (TOKENS // size if share else TOKENS)


def in_two_parts(rank: int, size: int, sequence_parallel: bool):
    """Calls and FLOPs of a backward for the tokens, for the matrices, for both."""
    tp = TensorParallel(dist.group.WORLD, sequence_parallel)
    x_TD, weights = whole(size)
    leaf = (x_TD.chunk(size)[rank] if sequence_parallel else x_TD).requires_grad_()
    own = [weight.requires_grad_() for weight in weights[rank]]
    outputs = tp.project(leaf * 1, *own)
    edges = [get_gradient_edge(y) for y in outputs]
    ones = [torch.ones_like(y) for y in outputs]
    found = {}
    for name, inputs in {"tokens": [leaf], "matrices": own, "both": [leaf, *own]}.items():
        with FlopCounterMode(display=False) as flops, TrafficCounter() as traffic:
            torch.autograd.grad(edges, inputs, ones, retain_graph=True)
        found[name] = (
            flops.get_total_flops(),
            {kind: sent.calls for (_, kind), sent in traffic.sent.items()},
        )
    return found


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_split_backward_does_nothing_twice(sequence_parallel):
    """Zero-bubble schedules ask for the gradients of the tokens first and of the matrices later."""
    half = 2 * TOKENS * WIDTH * sum(OUTPUTS)
    gathers = {"all_gather": 1} if sequence_parallel else {}
    sums = {"reduce_scatter": 1} if sequence_parallel else {"all_reduce": 1}
    for found in run_ranks(in_two_parts, 2, sequence_parallel):
        assert found["tokens"] == (half, sums)
        assert found["matrices"] == (half, gathers)
        assert found["both"] == (2 * half, gathers | sums)


def moves(rank: int, size: int, sequence_parallel: bool):
    tp = TensorParallel(dist.group.WORLD, sequence_parallel)
    part_TD = draw(rank, TOKENS, WIDTH).requires_grad_()
    left = tp.leave(part_TD)
    (
        left * draw(7, TOKENS, WIDTH).chunk(size)[rank if sequence_parallel else 0][:1]
    ).sum().backward()
    return left.detach(), part_TD.grad


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_leaving_sums_the_parts(sequence_parallel):
    size = 3
    found = run_ranks(moves, size, sequence_parallel)
    total_TD = sum(draw(rank, TOKENS, WIDTH) for rank in range(size))
    rows = [draw(7, TOKENS, WIDTH).chunk(size)[r][:1] for r in range(size)]
    if sequence_parallel:
        torch.testing.assert_close(torch.cat([left for left, _ in found]), total_TD)
        grad_TD = torch.cat([row.expand(TOKENS // size, -1) for row in rows])
    else:
        for left, _ in found:
            torch.testing.assert_close(left, total_TD)
        grad_TD = rows[0].expand(TOKENS, -1)
    for _, grad in found:
        torch.testing.assert_close(grad, grad_TD)
