"""Items in sets: each once, the largest differencing method as it is written down, and near the best.

Shapes: S items.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.plan.batch.partition import karmarkar_karp, sorted_greedy
from moesys.plan.placement import Amounts
from tests.plan.placements import seeds


def sums(amounts_S: Amounts, sets: list[list[int]]) -> list[float]:
    return [float(amounts_S[items].sum()) for items in sets]


def differencing(amounts_S: Amounts, number: int) -> list[float]:
    """Sums, with a vector of all sets for each state; the youngest first of those with the same spread."""
    states = [np.array([*[0.0] * (number - 1), amount]) for amount in np.sort(amounts_S)[::-1]]
    while len(states) > 1:
        states.sort(key=lambda state: state.min() - state.max())
        one, other, *states = states
        states.insert(0, np.sort(one) + np.sort(other)[::-1])
    return sorted(states[0].tolist()) if states else [0.0] * number


@given(seeds(), st.integers(0, 40), st.integers(1, 12))
def test_each_item_is_in_one_set(rng: np.random.Generator, items: int, number: int) -> None:
    amounts_S = rng.exponential(size=items) ** 2
    for partition in (sorted_greedy, karmarkar_karp):
        sets = partition(amounts_S, number)
        assert len(sets) == number
        assert sorted(itertools.chain(*sets)) == list(range(items))


@settings(deadline=None, max_examples=300)
@given(seeds(), st.integers(0, 60), st.integers(1, 12), st.sampled_from([0.2, 1.0, 3.0]))
def test_sums_are_those_of_the_method(
    rng: np.random.Generator, items: int, number: int, skew: float
) -> None:
    """Also where many amounts are the same."""
    for amounts_S in (rng.random(items) ** skew, rng.integers(0, 9, items).astype(float)):
        found = sorted(sums(amounts_S, karmarkar_karp(amounts_S, number)))
        assert found == pytest.approx(differencing(amounts_S, number))


def test_differencing_is_nearer_the_mean_than_greedy() -> None:
    rng = np.random.default_rng(0)
    over = {sorted_greedy: [], karmarkar_karp: []}
    for _ in range(50):
        amounts_S = rng.random(64)
        for partition, ratios in over.items():
            of_sets = sums(amounts_S, partition(amounts_S, 8))
            ratios.append(max(of_sets) / np.mean(of_sets) - 1)
    assert np.mean(over[karmarkar_karp]) < np.mean(over[sorted_greedy]) / 2
