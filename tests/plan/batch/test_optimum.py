"""The best plan there is: against all plans, gone through one by one; and how near it planners come.

Shapes: S sequences.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.optimum import optimum
from moesys.plan.batch.plan import MicroStep, Piece, batch_plan, problems
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


def all_micro_steps(sequences: Sequence[int], num_ranks: int) -> Iterator[tuple[MicroStep, ...]]:
    """Every plan of these: in any order, in any rings, with a new micro-step wherever one may begin."""
    rings = [
        ring
        for size in range(1, num_ranks + 1)
        for ring in itertools.permutations(range(num_ranks), size)
    ]
    for order in itertools.permutations(sequences):
        for chosen in itertools.product(rings, repeat=len(order)):
            pieces = [Piece(sequence, ring) for sequence, ring in zip(order, chosen, strict=True)]
            for begins in itertools.product((False, True), repeat=len(order) - 1):
                steps: list[list[Piece]] = [[pieces[0]]]
                for piece, begin in zip(pieces[1:], begins, strict=True):
                    steps += [[piece]] if begin else []
                    if not begin:
                        steps[-1].append(piece)
                yield tuple(map(tuple, steps))


@pytest.mark.parametrize("meets", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_no_plan_is_better(seed: int, meets: bool) -> None:
    lengths_S, num_ranks, capacity, costs = case(seed, 2, 3)
    best_s = math.inf
    for steps in all_micro_steps(range(len(lengths_S)), num_ranks):
        plan = batch_plan(lengths_S, num_ranks, steps)
        if not problems(plan, capacity):
            best_s = min(best_s, batch_seconds(plan, costs, meets=meets))
    found = optimum(lengths_S, num_ranks, capacity, costs, meets=meets)
    assert problems(found, capacity) == []
    assert batch_seconds(found, costs, meets=meets) == pytest.approx(best_s, rel=1e-9)


def over_optimum(made: Case, meets: bool) -> float:
    lengths_S, num_ranks, capacity, costs = made
    plan = planned("hdp", lengths_S, num_ranks, capacity, costs, meets=meets)
    best = optimum(lengths_S, num_ranks, capacity, costs, meets=meets)
    return batch_seconds(plan, costs, meets=meets) / batch_seconds(best, costs, meets=meets)


@pytest.mark.parametrize("meets", [False, True])
def test_hdp_is_within_a_twentieth_of_the_best_plan(meets: bool) -> None:
    over = [over_optimum(case(seed, 4, 4), meets) for seed in range(100)]
    assert max(over) <= 1.05
    assert np.mean(over) <= 1.002


@pytest.mark.oracle
@pytest.mark.parametrize("meets", [False, True])
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_hdp_is_within_a_twentieth_of_the_best_plan_of_more_sequences(
    seed: int, meets: bool
) -> None:
    made = case(seed, 6, 3)
    assert over_optimum(made, meets) <= 1.05
