"""Groups of different sizes in each micro-step: against the program of the paper, nearly even work, and what it says when it cannot.

Shapes: N sequences, P groups that there might be, Q = N * P.
"""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import milp

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.flexsp import flexsp, group_sizes
from moesys.plan.batch.group_program import Bucket, group_counts
from moesys.plan.batch.plan import problems
from moesys.plan.batch.policies import batch_seconds, planned
from moesys.plan.placement import Integers
from moesys.plan.zigzag import most_ring_tokens
from tests.plan.batch.test_planners import CAPACITY, COSTS, heavy_tailed
from tests.plan.placements import seeds


def least_s(lengths_N: Integers, num_ranks: int, capacity: int, costs: BatchCosts) -> float | None:
    """Of a micro-step: the program of FlexSP (2412.01523), a name for each group and no buckets."""
    sizes_P = np.array([size for size in group_sizes(num_ranks) for _ in range(num_ranks // size)])
    n, p = len(lengths_N), len(sizes_P)
    # The solver's tolerances are absolute.
    even_s = float(costs.work_s(lengths_N).sum()) / num_ranks
    seconds_NP = costs.rank_s(lengths_N[:, None], sizes_P) / even_s
    tokens_NP = np.array([[most_ring_tokens(x, size) for size in sizes_P.tolist()] for x in lengths_N.tolist()])  # fmt: skip
    rows, least, most = [], [], []

    def add(row_NP: np.ndarray, of_groups_P: np.ndarray, time: float, lo: float, hi: float) -> None:
        rows.append(np.concatenate([row_NP.ravel(), of_groups_P, [time]]))
        least.append(lo)
        most.append(hi)

    for sequence in range(n):
        add(np.outer(np.arange(n) == sequence, np.ones(p)), np.zeros(p), 0, 1, 1)
    for group in range(p):
        here_P = np.arange(p) == group
        add(seconds_NP * here_P, np.zeros(p), -1, -np.inf, 0)
        add(tokens_NP * here_P, -capacity * here_P, 0, -np.inf, 0)
    add(np.zeros((n, p)), sizes_P, 0, 0, num_ranks)
    objective = np.append(np.zeros(n * p + p), 1.0)
    found = milp(
        objective,
        integrality=1 - objective,
        bounds=(0, np.append(np.ones(n * p + p), np.inf)),
        constraints=(np.array(rows), least, most),
    )
    return float(found.fun) * even_s if found.status == 0 else None


@settings(max_examples=20)
@given(seeds(), st.integers(1, 4), st.integers(1, 6))
def test_a_micro_step_is_near_the_best_there_is(
    rng: np.random.Generator, num_ranks: int, number: int
) -> None:
    """Which the paper's program finds, given time: small cases only. Both count what each sequence waits for keys by itself, though
    those of a group go around together."""
    lengths_N = rng.integers(1, num_ranks * CAPACITY // number + 1, number)
    best_s = least_s(lengths_N, num_ranks, CAPACITY, COSTS)
    plan = flexsp(lengths_N, num_ranks, CAPACITY, COSTS)
    assert best_s is not None or len(plan.micro_steps) > 1
    if best_s is not None and len(plan.micro_steps) == 1:
        counted_R = np.zeros(num_ranks)
        for _, (sequence, ranks) in plan.pieces():
            counted_R[list(ranks)] += COSTS.rank_s(lengths_N[sequence], len(ranks))
        assert best_s * (1 - 1e-4) <= counted_R.max() <= 1.08 * best_s


@given(seeds(), st.integers(1, 9), st.integers(1, 6), st.floats(0.5, 3.0))
def test_counted_groups_have_what_they_need(
    rng: np.random.Generator, num_ranks: int, number: int, times: float
) -> None:
    sizes_G = np.array(group_sizes(num_ranks))
    lengths = rng.integers(1, num_ranks * CAPACITY, number)
    buckets = [
        Bucket(
            sequences=int(rng.integers(1, 5)),
            seconds_G=COSTS.rank_s(length, sizes_G),
            tokens_G=-(-length // sizes_G),
        )
        for length in lengths.tolist()
    ]
    sequences_B = np.array([bucket.sequences for bucket in buckets])
    most_s = times * float(COSTS.work_s(lengths) @ sequences_B) / num_ranks
    counts = group_counts(buckets, sizes_G, num_ranks, CAPACITY, most_s)
    if counts is None:
        return
    assert (counts.sequences_BG >= 0).all()
    assert counts.sequences_BG.sum(1).tolist() == sequences_B.tolist()
    assert counts.groups_G @ sizes_G <= num_ranks
    for of_bucket, room in (("seconds_G", most_s), ("tokens_G", CAPACITY)):
        load_BG = np.stack([getattr(bucket, of_bucket) for bucket in buckets])
        need_G = (load_BG * counts.sequences_BG).sum(0)
        assert (need_G <= room * counts.groups_G * (1 + 1e-5)).all()
        halves_G = ((load_BG > room / 2) * counts.sequences_BG).sum(0)
        assert (halves_G <= counts.groups_G).all()
        assert not counts.sequences_BG[load_BG > room * (1 + 1e-9)].any()


def test_groups_are_powers_of_two_or_all_on_neighbours() -> None:
    assert [group_sizes(number) for number in (1, 2, 3, 8, 9)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 9]]  # fmt: skip
    lengths_S = heavy_tailed(np.random.default_rng(0), 400, 12_000)
    plan = flexsp(lengths_S, 16, 1024, COSTS)
    for _, piece in plan.pieces():
        size = len(piece.ranks)
        assert size in group_sizes(16)
        assert piece.ranks == tuple(range(piece.ranks[0], piece.ranks[0] + size))
        assert piece.ranks[0] % size == 0, "a group of ranks that is always the same"


@pytest.mark.parametrize(("num_ranks", "number", "longest"), [(8, 200, 3000), (64, 600, 16_384)])
def test_work_is_nearly_even(num_ranks: int, number: int, longest: int) -> None:
    lengths_S = heavy_tailed(np.random.default_rng(0), number, longest)
    even_s = float(COSTS.work_s(lengths_S).sum()) / num_ranks
    seconds = {}
    for policy in ("static", "naive", "flexsp"):
        plan = planned(policy, lengths_S, num_ranks, 1024, COSTS, meets=True)
        assert problems(plan, 1024) == []
        seconds[policy] = batch_seconds(plan, COSTS, meets=True) / even_s
    assert seconds["flexsp"] < 1.06
    assert seconds["flexsp"] < seconds["static"] / 1.1
    assert seconds["flexsp"] < seconds["naive"] / 1.2


def test_what_rings_cannot_use_of_an_odd_capacity_is_told() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 20 tokens, .* an even number"):
        flexsp(np.array([3, 20]), 4, 5, COSTS)


def test_scipy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match=r"pip install 'moesys\[planning\]'"):
        flexsp(np.array([3]), 4, CAPACITY, COSTS)
