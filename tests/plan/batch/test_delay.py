"""Outliers that wait: each goes once and in time, a queue is resumed exactly, and batches with one outlier each are spared.

Shapes: S sequences.
"""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.plan.batch.delay import Delayed, Going, OutlierDelay, Waiting, delayed
from moesys.plan.batch.partition import sorted_greedy
from moesys.plan.batch.plan import problems
from moesys.plan.batch.policies import batch_seconds, planned
from moesys.plan.batch.static import balanced
from moesys.plan.placement import Integers
from tests.plan.batch.test_planners import CAPACITY, COSTS, random_lengths
from tests.plan.placements import seeds

DELAY = OutlierDelay(least_tokens=(100, 300), num_micro_batches=3, most_batches=4)
EMPTY = Delayed()


def gone(
    batches: list[Integers], delay: OutlierDelay, queue: Delayed = EMPTY, first: int = 0
) -> tuple[list[Going], list[Delayed]]:
    """All batches from the first on; ids are places in all of them."""
    ends = np.cumsum([len(lengths_S) for lengths_S in batches])
    batches_gone, queues = [], []
    for index in range(first, len(batches)):
        lengths_S = batches[index]
        ids_S = np.arange(ends[index] - len(lengths_S), ends[index])
        is_last = index == len(batches) - 1
        going, queue = delayed(queue, ids_S, lengths_S, delay, is_last=is_last)
        batches_gone.append(going)
        queues.append(queue)
    return batches_gone, queues


def random_batches(rng: np.random.Generator) -> list[Integers]:
    return [random_lengths(rng, 4) for _ in range(rng.integers(1, 12))]


def test_a_level_goes_when_there_is_one_for_each_micro_batch() -> None:
    queue = EMPTY
    going, queue = delayed(queue, np.arange(4), np.array([99, 100, 300, 299]), DELAY, is_last=False)
    assert going.ids_S.tolist() == [0]
    assert queue.waiting == (Waiting(1, 100, 1), Waiting(2, 300, 1), Waiting(3, 299, 1))
    going, queue = delayed(queue, np.arange(4, 7), np.array([150, 5, 120]), DELAY, is_last=False)
    assert going.ids_S.tolist() == [1, 3, 4, 5], "those that waited longest, of the lower level"
    assert going.lengths_S.tolist() == [100, 299, 150, 5]
    assert queue.waiting == (Waiting(2, 300, 2), Waiting(6, 120, 1))


@given(seeds())
def test_each_sequence_goes_once_and_in_time(rng: np.random.Generator) -> None:
    batches = random_batches(rng)
    arrived = np.repeat(np.arange(len(batches)), [len(lengths_S) for lengths_S in batches])
    lengths_S = np.concatenate(batches)
    batches_gone, queues = gone(batches, DELAY)
    assert np.sort(np.concatenate([going.ids_S for going in batches_gone])).tolist() == [
        *range(len(lengths_S))
    ]
    for index, going in enumerate(batches_gone):
        assert going.lengths_S.tolist() == lengths_S[going.ids_S].tolist()
        waited_S = index - arrived[going.ids_S]
        assert (waited_S <= DELAY.most_batches).all()
        assert (waited_S[going.lengths_S < DELAY.least_tokens[0]] == 0).all()
    assert queues[-1] == EMPTY


@given(seeds())
def test_a_run_that_resumes_continues_the_same(rng: np.random.Generator) -> None:
    batches = random_batches(rng)
    batches_gone, queues = gone(batches, DELAY)
    at = int(rng.integers(0, len(batches)))
    stored = Delayed.from_json(json.loads(json.dumps(queues[at].to_json())))
    resumed, _ = gone(batches, DELAY, stored, at + 1)
    assert [going.ids_S.tolist() for going in resumed] == [
        going.ids_S.tolist() for going in batches_gone[at + 1 :]
    ]


def test_a_queue_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 9, where 1 is read"):
        Delayed.from_json(EMPTY.to_json() | {"version": 9})


@given(seeds(), st.sampled_from(["sorted", "hdp"]))
def test_what_goes_is_planned_by_any_policy(rng: np.random.Generator, policy: str) -> None:
    for going in gone(random_batches(rng), DELAY)[0]:
        plan = planned(policy, going.lengths_S, 4, CAPACITY, COSTS, meets=True)
        assert problems(plan, CAPACITY) == []


def test_a_heavy_tail_is_levelled_on_a_static_mesh() -> None:
    """16 ranks of context, 4 of data, two micro-steps; one sequence of 50 is an outlier, so that a batch has 3 of them for its 8
    micro-batches."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(60):
        lengths_S = rng.lognormal(5.6, 1.0, 150)
        is_long = rng.random(150) < 0.02
        lengths_S[is_long] = 16_384 * rng.uniform(0.3, 1.0, int(is_long.sum()))
        batches.append(np.clip(lengths_S, 1, 16_384).astype(np.int64))

    def over_even(chosen: list[Integers]) -> float:
        plans = [balanced(s, 64, 1024, 16, COSTS, sorted_greedy) for s in chosen]
        assert all(problems(plan, 1024) == [] for plan in plans)
        even_s = float(COSTS.own_s(np.concatenate(chosen), 16).sum()) * 16 / 64
        return sum(batch_seconds(plan, COSTS, meets=True) for plan in plans) / even_s

    assert over_even(batches) > 1.4
    for least_tokens, most in (((4096,), 1.3), ((4096, 6144, 8192, 12_288), 1.12)):
        delay = OutlierDelay(least_tokens=least_tokens, num_micro_batches=8, most_batches=10)
        batches_gone, queues = gone(batches, delay)
        assert over_even([going.lengths_S for going in batches_gone]) < most
        assert max(one.batches for queue in queues for one in queue.waiting) <= 10
