"""Budgets that every choice keeps to, against all choices there are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.plan.codec_choice import NEAR, STEPS_PER_LAYER, Trial, within_bytes, within_error

NONE = Trial(error=0.0, sent_bytes=1000, ms=10.0)
CANDIDATES = st.lists(
    st.builds(
        Trial,
        error=st.floats(1e-3, 2.0),
        sent_bytes=st.integers(0, 1200),
        ms=st.floats(0.1, 20.0),
    ),
    min_size=3,
    max_size=3,
)
LAYERS = st.lists(CANDIDATES.map(lambda candidates: [NONE, *candidates]), min_size=1, max_size=4)


def of(trials_MX: list[list[Trial]], taken_M: list[int]) -> list[Trial]:
    return [trials_X[x] for trials_X, x in zip(trials_MX, taken_M, strict=True)]


def total_bytes(trials: list[Trial]) -> int:
    return sum(trial.sent_bytes for trial in trials)


def squared_error(trials: list[Trial]) -> float:
    return sum(trial.error**2 for trial in trials)


@given(LAYERS, st.floats(0.01, 2.0))
def test_the_fastest_within_an_error(trials_MX, budget):
    for trials_X, taken in zip(
        trials_MX, of(trials_MX, within_error(trials_MX, budget)), strict=True
    ):
        allowed = [trial for trial in trials_X if trial.error <= budget]
        assert taken in allowed
        assert taken.ms <= NEAR * min(trial.ms for trial in allowed)


def test_what_is_hardly_faster_is_not_worth_its_error():
    trials_X = [NONE, Trial(0.1, 100, 8.0), Trial(0.2, 50, 7.9), Trial(0.9, 5, 1.0)]
    assert within_error([trials_X], 0.3) == [1]
    assert within_error([trials_X], 0.9) == [3]
    assert within_error([trials_X], 0.05) == [0]


@given(LAYERS, st.floats(0.01, 1.0))
def test_bytes_keep_to_their_budget_with_nearly_the_least_error(trials_MX, share):
    taken = of(trials_MX, within_bytes(trials_MX, share))
    budget = share * 1000 * len(trials_MX)
    choices = [list(choice) for choice in itertools.product(*trials_MX)]
    fewest = min(map(total_bytes, choices))
    if fewest >= budget:
        assert total_bytes(taken) == fewest
        return
    assert total_bytes(taken) <= budget
    # What rounding takes is a step for each layer.
    tighter = [c for c in choices if total_bytes(c) <= budget * (1 - 1 / STEPS_PER_LAYER)]
    if tighter:
        assert squared_error(taken) <= min(map(squared_error, tighter)) + 1e-12


def test_bytes_go_to_the_layer_that_needs_them():
    """Half of the bytes: by equal shares both layers would be off by 0.5."""
    needs, easy = Trial(0.5, 500, 5.0), Trial(0.01, 500, 5.0)
    trials_MX = [[NONE, needs, Trial(0.9, 100, 1.0)], [NONE, easy, Trial(0.02, 0, 1.0)]]
    assert within_bytes(trials_MX, 0.5) == [0, 2]
    assert within_bytes(trials_MX, 1.0) == [0, 0]


@pytest.mark.parametrize("choose", [within_error, within_bytes])
def test_nothing_to_choose(choose):
    assert choose([], 0.5) == []
    assert choose([[NONE]] * 2, 0.5) == [0, 0]


def test_layers_that_send_nothing():
    """One rank has all experts that its tokens go to."""
    assert within_bytes([[Trial(0.0, 0, 1.0), Trial(0.1, 0, 1.0)]], 0.5) == [0]


@pytest.mark.parametrize("budget", [0.05, 0.5, 1.0])
def test_what_has_no_finite_error_is_never_taken(budget):
    trials_X = [
        NONE,
        Trial(float("nan"), 10, 1.0),
        Trial(float("inf"), 5, 1.0),
        Trial(0.1, 20, 9.0),
    ]
    assert within_bytes([trials_X], budget) == ([3] if budget < 1 else [0])
    assert within_error([trials_X], budget) == ([0] if budget < 0.1 else [3])
