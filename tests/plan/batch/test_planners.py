"""What every planner of batches must hold to, and how near the best possible they are.

Shapes: S sequences.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.plan import problems
from moesys.plan.batch.policies import LEVEL, POLICIES, batch_seconds, planned
from moesys.plan.placement import Integers
from tests.plan.placements import seeds

COSTS = BatchCosts(
    attention=(AttentionKind(pair_s=1e-9), AttentionKind(pair_s=1e-9, window=64)),
    token_s=1e-6,
    piece_s=1e-6,
    micro_step_s=1e-5,
    block_token_s=1e-8,
    hop_s=1e-7,
)
CAPACITY = 256


def random_lengths(rng: np.random.Generator, num_ranks: int) -> Integers:
    """Of any skew, some empty, none too long."""
    number = int(rng.integers(0, 40))
    lengths = rng.exponential(size=number) ** rng.uniform(0, 3) * rng.integers(1, 200)
    return np.minimum(lengths, num_ranks * (CAPACITY - 2)).astype(np.int64)


@given(
    seeds(), st.sampled_from(POLICIES), st.integers(1, 9), st.booleans(), st.sampled_from([1, 3])
)
def test_each_sequence_once_within_memory_the_same_every_time(
    rng: np.random.Generator, policy: str, num_ranks: int, meets: bool, stages: int
) -> None:
    lengths_S = random_lengths(rng, num_ranks)
    plans = [
        planned(policy, lengths_S, num_ranks, CAPACITY, COSTS, meets=meets, stages=stages)
        for _ in range(2)
    ]
    assert problems(plans[0], CAPACITY) == []
    assert plans[0].tokens_MR().sum() == lengths_S.sum()
    assert plans[0].micro_steps == plans[1].micro_steps


@given(seeds(), st.integers(1, 9), st.booleans(), st.sampled_from([1, 3]))
def test_never_worse_than_naive_nor_much_worse_than_groups_of_one_size(
    rng: np.random.Generator, num_ranks: int, meets: bool, stages: int
) -> None:
    lengths_S = random_lengths(rng, num_ranks)
    where = {"meets": meets, "stages": stages}
    seconds = {
        policy: batch_seconds(
            planned(policy, lengths_S, num_ranks, CAPACITY, COSTS, **where), COSTS, **where
        )
        for policy in ("naive", "static", "karmarkar_karp", "hdp")
    }
    assert seconds["hdp"] <= seconds["naive"] * (1 + 1e-9)
    assert seconds["hdp"] <= LEVEL * min(seconds.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sequence_that_no_rank_has_memory_for_is_named(policy: str) -> None:
    lengths_S = np.array([5, 4 * CAPACITY + 1])
    with pytest.raises(ValueError, match=r"sequence 1 has 1025 tokens, and 4 ranks of 256 tokens"):
        planned(policy, lengths_S, 4, CAPACITY, COSTS, meets=False)


def heavy_tailed(rng: np.random.Generator, number: int, longest: int) -> Integers:
    """Lognormal, and a few of up to `longest` tokens."""
    lengths = rng.lognormal(5.0, 1.2, number)
    lengths[: number // 100] = longest * rng.uniform(0.3, 1.0, number // 100)
    return np.clip(lengths, 1, longest).astype(np.int64)


@pytest.mark.parametrize("meets", [False, True])
def test_a_heavy_tail_is_levelled(meets: bool) -> None:
    """Against a mesh that must hold the longest sequence, which cuts all others for as many ranks."""
    lengths_S = heavy_tailed(np.random.default_rng(0), 2000, 16_384)
    seconds = {
        policy: batch_seconds(
            planned(policy, lengths_S, 64, 1024, COSTS, meets=meets), COSTS, meets=meets
        )
        for policy in POLICIES
    }
    even_s = float(COSTS.work_s(lengths_S).sum()) / 64
    assert seconds["hdp"] < 1.1 * even_s
    assert seconds["hdp"] < seconds["naive"] / 1.2
    assert seconds["hdp"] < seconds["karmarkar_karp"]


@pytest.mark.parametrize("meets", [False, True])
def test_pipelines_have_more_micro_steps_of_like_length(meets: bool) -> None:
    """That fill them: with as few as memory allows, four stages are idle for half of the time."""
    lengths_S = np.random.default_rng(0).integers(32, 64, 8 * 3 * 5)

    def over_even(planned_for: int) -> tuple[int, float]:
        plan = planned("hdp", lengths_S, 8, CAPACITY, COSTS, meets=meets, stages=planned_for)
        even_s = float(COSTS.work_s(lengths_S).sum()) / (8 * 4)
        return len(plan.micro_steps), batch_seconds(plan, COSTS, meets=meets, stages=4) / even_s

    fewest, unaware = over_even(1)
    number, aware = over_even(4)
    assert number >= 3 * fewest
    assert unaware > 2.1
    assert aware < 1.55


def test_a_static_mesh_is_made_for_the_longest_of_all_batches() -> None:
    lengths_S = np.array([100, 200, 30])

    def sizes(longest: int) -> set[int]:
        plan = planned("static", lengths_S, 8, CAPACITY, COSTS, meets=False, longest_tokens=longest)
        return {len(piece.ranks) for _, piece in plan.pieces()}

    assert [sizes(longest) for longest in (0, 256, 257, 4 * CAPACITY)] == [{1}, {1}, {2}, {4}]


def test_a_sequence_that_fits_no_divisor_of_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens fits no group of ranks of 1 tokens that 4"):
        planned("static", np.array([3]), 4, 1, COSTS, meets=False)
