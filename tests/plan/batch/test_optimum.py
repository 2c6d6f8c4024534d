"""The best plan there is: against all plans, gone through one by one; and how near it planners come.

Shapes: S sequences.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.optimum import optimum
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan, problems
from moesys.plan.batch.policies import batch_seconds, planned
from moesys.plan.placement import Integers

Case = tuple[Integers, int, int, BatchCosts]


def case(seed: int, most_sequences: int, most_ranks: int) -> Case:
    """Sequences of any skew, with more tokens than there are ranks; links and starts that cost nothing or much."""
    rng = np.random.default_rng(seed)
    num_ranks = int(rng.integers(1, most_ranks + 1))
    number = int(rng.integers(1, most_sequences + 1))
    capacity = int(rng.integers(16, 300))
    drawn = rng.exponential(size=number) ** rng.uniform(0, 2) * rng.integers(1, 300)
    lengths_S = np.clip(num_ranks + drawn, 1, num_ranks * (capacity - 2)).astype(np.int64)
    mean = float(lengths_S.mean())

    def some() -> float:
        return float(rng.random() ** 2 * (rng.random() < 0.7))

    return (
        lengths_S,
        num_ranks,
        capacity,
        BatchCosts(
            attention=(
                AttentionKind(pair_s=2 * some() / mean),
                AttentionKind(pair_s=some() / mean, window=20),
            ),
            token_s=1.0,
            piece_s=0.1 * mean * some(),
            micro_step_s=0.3 * mean * some(),
            block_token_s=some(),
            hop_s=0.1 * mean * some(),
        ),
    )


def all_plans(lengths_S: Integers, num_ranks: int) -> Iterator[BatchPlan]:
    """Each sequence on any ranks, in any order of their ring, and in any of as many micro-steps as there are sequences."""
    number = len(lengths_S)
    rings = [
        ring
        for size in range(1, num_ranks + 1)
        for ring in itertools.permutations(range(num_ranks), size)
    ]
    for chosen in itertools.product(rings, repeat=number):
        for indexes in itertools.product(range(number), repeat=number):
            steps: list[list[Piece]] = [[] for _ in range(number)]
            for sequence, (ring, index) in enumerate(zip(chosen, indexes, strict=True)):
                steps[index].append(Piece(sequence, ring))
            yield batch_plan(lengths_S, num_ranks, steps)


@pytest.mark.parametrize("meets", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)])
@pytest.mark.parametrize("seed", range(12))
def test_no_plan_is_better(seed: int, sizes: tuple[int, int], meets: bool) -> None:
    lengths_S, num_ranks, capacity, costs = case(seed, *sizes)
    best_s = math.inf
    for plan in all_plans(lengths_S, num_ranks):
        plan_s = batch_seconds(plan, costs, meets=meets)
        if plan_s < best_s and not problems(plan, capacity):
            best_s = plan_s
    found = optimum(lengths_S, num_ranks, capacity, costs, meets=meets)
    assert problems(found, capacity) == []
    assert batch_seconds(found, costs, meets=meets) == pytest.approx(best_s, rel=1e-9)


@pytest.mark.parametrize("meets", [False, True])
def test_a_ring_goes_the_other_way_where_memory_is_short(meets: bool) -> None:
    """Ranks have 5 and 6 tokens of one sequence, 3 and 4 of the other: 9 and 9 if their rings are not the same."""
    costs = BatchCosts(attention=(AttentionKind(pair_s=0.0),), token_s=1.0, micro_step_s=100.0)
    (step,) = optimum(np.array([11, 7]), 2, 9, costs, meets=meets).micro_steps
    assert {step[0].ranks, step[1].ranks} == {(0, 1), (1, 0)}


def test_blocks_need_not_be_nested() -> None:
    """Of 12 tokens a rank has no memory; on two they take 6 and a hop. No rank is ever idle, and at no time do all ranks end.

    rank 0: 10 tokens 0-10, 12 tokens 10-18
    rank 1: 12 tokens 0-8, 2 tokens 8-10, 12 tokens 10-18
    rank 2: 12 tokens 0-8, 10 tokens 8-18
    """
    costs = BatchCosts(attention=(AttentionKind(pair_s=0.0),), token_s=1.0, hop_s=2.0)
    plan = optimum(np.array([12, 12, 10, 10, 2]), 3, 10, costs, meets=False)
    assert batch_seconds(plan, costs, meets=False) == pytest.approx(18)


@pytest.mark.parametrize("meets", [False, True])
def test_a_batch_without_tokens_has_no_micro_steps(meets: bool) -> None:
    assert optimum(np.array([0, 0]), 2, 5, case(0, 2, 3)[3], meets=meets).micro_steps == ()


def over_optimum(made: Case, meets: bool) -> float:
    lengths_S, num_ranks, capacity, costs = made
    plan = planned("hdp", lengths_S, num_ranks, capacity, costs, meets=meets)
    best = optimum(lengths_S, num_ranks, capacity, costs, meets=meets)
    return batch_seconds(plan, costs, meets=meets) / batch_seconds(best, costs, meets=meets)


@pytest.mark.parametrize("meets", [False, True])
def test_hdp_is_within_a_twentieth_of_the_best_plan(meets: bool) -> None:
    over = [over_optimum(case(seed, 4, 4), meets) for seed in range(100)]
    assert min(over) >= 1 - 1e-9, "better than the best"
    assert max(over) <= 1.05
    assert np.mean(over) <= 1.001


@pytest.mark.oracle
@pytest.mark.parametrize("meets", [False, True])
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_hdp_is_within_a_twentieth_of_the_best_plan_of_more_sequences(
    seed: int, meets: bool
) -> None:
    made = case(seed, 6, 3)
    assert 1 - 1e-9 <= over_optimum(made, meets) <= 1.05
