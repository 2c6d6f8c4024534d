"""Times of plans: by hand, and what bounds them.

Shapes: S sequences, P pieces of a micro-step, M micro-steps, R ranks.
"""

import numpy as np
import pytest
from hypothesis import given

from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.batch.seconds import BatchSeconds, meeting, plan_seconds, rank_seconds
from moesys.plan.placement import Amounts, Integers
from tests.plan.placements import seeds

COSTS = BatchCosts(
    attention=(AttentionKind(pair_s=1.0),),
    token_s=10.0,
    piece_s=3.0,
    micro_step_s=5.0,
    block_token_s=4.0,
    hop_s=2.0,
)


def piece_seconds(lengths_S: Integers, step: tuple[Piece, ...]) -> tuple[Amounts, Amounts]:
    """In all, and of this for keys."""
    seconds_P, waited_P = zip(*BatchSeconds(lengths_S, 4, COSTS).of_pieces(step), strict=True)
    return np.array(seconds_P), np.array(waited_P)


def free_s(plan: BatchPlan) -> float:
    return plan_seconds(plan, COSTS, meets=False)


def in_step_s(plan: BatchPlan) -> float:
    return plan_seconds(plan, COSTS, meets=True)


def test_sequences_on_one_ring_wait_as_one_block() -> None:
    """Of 8 and 4 tokens, 36 and 10 pairs: a block of 6 takes 26, the work beside it 11.5 and two starts. Each alone waits 6 and 4.5:
    a hop more."""
    (lengths_S, on) = np.array([8, 4]), (0, 1)
    seconds_P, waited_P = piece_seconds(lengths_S, (Piece(0, on), Piece(1, on)))
    assert waited_P.tolist() == pytest.approx([8.5 * 8 / 12, 8.5 * 4 / 12])
    assert seconds_P.tolist() == pytest.approx([64 + 8.5 * 8 / 12, 31 + 8.5 * 4 / 12])
    # In another order they are two rings.
    apart = piece_seconds(lengths_S, (Piece(0, on), Piece(1, on[::-1])))[1]
    assert apart.tolist() == [6, 4.5]


def test_work_on_a_long_sequence_hides_the_hop_of_a_short_one() -> None:
    """Of 100 and 8 tokens: a block of 54 takes 218, the work beside it a quarter of 5086 pairs."""
    step = (Piece(0, (1, 0)), Piece(2, (2,)), Piece(1, (1, 0)))
    seconds_P, waited_P = piece_seconds(np.array([100, 8, 1]), step)
    assert waited_P.tolist() == [0, 0, 0]
    assert seconds_P.tolist() == [2525 + 500 + 6, 1 + 10 + 3, 18 + 40 + 6]


def test_plans_by_hand() -> None:
    """Rank 1 has less beside the ring, and waits for rank 0."""
    plan = batch_plan(np.array([1, 2, 8]), 2, [[Piece(0, (1,)), Piece(1, (0,)), Piece(2, (0, 1))]])
    one, two, ring = 1 + 10 + 3, 3 + 20 + 3, 70
    assert rank_seconds(plan, COSTS).tolist() == [[5 + two + ring, 5 + one + ring]]
    assert free_s(plan) == 5 + two + ring
    assert in_step_s(plan) == 5 + two + ring
    apart = batch_plan(
        np.array([1, 2, 8]),
        2,
        [[Piece(0, (1,)), Piece(1, (0,))], [Piece(1, (1,)), Piece(0, (0,))]],
    )
    assert in_step_s(apart) == 2 * (5 + two)
    assert free_s(apart) == 2 * 5 + one + two


def test_ranks_of_a_ring_end_with_the_one_that_has_the_most() -> None:
    """Rank 0 has a sequence beside the ring, so rank 1 begins its next micro-step late; rank 2 does not wait for them."""
    eight, one, two, ring = 36 + 80 + 3, 1 + 10 + 3, 3 + 20 + 3, 70
    step = [Piece(0, (0,)), Piece(1, (0, 1)), Piece(2, (2,))]
    plan = batch_plan(np.array([8, 8, 2, 1, 8]), 3, [step, [Piece(3, (1,)), Piece(4, (2,))]])
    assert rank_seconds(plan, COSTS).tolist() == [
        [5 + eight + ring, 5 + ring, 5 + two],
        [0, 5 + one, 5 + eight],
    ]
    assert free_s(plan) == (5 + eight + ring) + (5 + one)
    assert in_step_s(plan) == (5 + eight + ring) + (5 + eight)


def test_ranks_of_a_ring_begin_with_the_one_that_is_free_last() -> None:
    """Rank 0 has a micro-step before, and rank 1 goes on after the ring."""
    steps = [[Piece(0, (0,))], [Piece(1, (0, 1))], [Piece(2, (1,))]]
    plan = batch_plan(np.array([8, 8, 1]), 2, steps)
    assert free_s(plan) == (5 + 36 + 80 + 3) + (5 + 70) + (5 + 14)


@pytest.mark.parametrize(
    ("rings", "joined"),
    [
        ([], []),
        ([(0,), (1,)], []),
        ([(2, 0), (1,), (0, 2)], [[0, 2]]),
        ([(0, 1), (3, 2), (4,)], [[0, 1], [2, 3]]),
        ([(0, 1), (2, 1), (2, 4)], [[0, 1, 2, 4]]),
        ([(0, 1), (4, 5, 6), (3, 2), (5, 1)], [[0, 1, 4, 5, 6], [2, 3]]),
        ([(0, 1), (2, 3), (4, 5), (1, 2, 4), (5, 0)], [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_ranks_meet_in_a_ring_or_over_others(
    rings: list[tuple[int, ...]], joined: list[list[int]]
) -> None:
    step = tuple(Piece(sequence, ring) for sequence, ring in enumerate(rings))
    assert sorted(map(sorted, meeting(step))) == joined


def random_plan(rng: np.random.Generator) -> BatchPlan:
    """Of few ranks, so that sequences often share a ring."""
    num_ranks, number = int(rng.integers(1, 5)), int(rng.integers(1, 12))
    lengths_S = (rng.exponential(size=number) ** 2 * 20).astype(np.int64) + 1
    steps: list[list[Piece]] = [[] for _ in range(3)]
    for sequence in range(number):
        size = int(rng.integers(1, num_ranks + 1))
        ring = rng.permutation(num_ranks)[:size] if rng.random() < 0.3 else np.arange(size)
        steps[rng.integers(3)].append(Piece(sequence, tuple(ring.tolist())))
    return batch_plan(lengths_S, num_ranks, steps)


@given(seeds())
def test_pieces_add_up_to_ranks_and_ranks_bound_the_plan(rng: np.random.Generator) -> None:
    plan = random_plan(rng)
    busy_MR = rank_seconds(plan, COSTS)
    summed_MR = np.zeros_like(busy_MR)
    for summed_R, step in zip(summed_MR, plan.micro_steps, strict=True):
        seconds_P, _ = piece_seconds(plan.lengths_S, step)
        for piece, piece_s in zip(step, seconds_P, strict=True):
            summed_R[list(piece.ranks)] += piece_s
    assert busy_MR == pytest.approx(summed_MR + 5 * (summed_MR > 0))
    close = 1 + 1e-9
    assert busy_MR.sum(0).max() <= free_s(plan) * close
    assert free_s(plan) <= in_step_s(plan) * close


@given(seeds())
def test_no_sequence_waits_more_for_what_is_in_its_ring(rng: np.random.Generator) -> None:
    """All of a ring together; and which of them comes first is all the same."""
    plan = random_plan(rng)
    for step in plan.micro_steps:
        seconds_P, waited_P = piece_seconds(plan.lengths_S, step)
        lengths_P, sizes = plan.lengths_S[[p.sequence for p in step]], [len(p.ranks) for p in step]
        assert (seconds_P - waited_P) == pytest.approx(COSTS.own_s(lengths_P, sizes))
        alone_P = COSTS.waited_s(lengths_P, sizes)
        for ranks in {piece.ranks for piece in step}:
            here_P = [piece.ranks == ranks for piece in step]
            assert waited_P[here_P].sum() <= alone_P[here_P].sum() * (1 + 1e-9)
    mixed = [rng.permutation(np.array(step, dtype=object)).tolist() for step in plan.micro_steps]
    shuffled = batch_plan(
        plan.lengths_S, plan.num_ranks, [[Piece(*piece) for piece in step] for step in mixed]
    )
    assert rank_seconds(shuffled, COSTS) == pytest.approx(rank_seconds(plan, COSTS))
    assert free_s(shuffled) == pytest.approx(free_s(plan))
