"""Loads of the next step from those before."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.plan.load_prediction import (
    PREDICTORS,
    predicted_loads,
    prediction_errors,
    steps_needed,
)
from tests.plan.placements import random_loads, seeds

each_predictor = pytest.mark.parametrize("predictor", PREDICTORS)


def history(*loads: list[float]) -> np.ndarray:
    """Of one layer."""
    return np.array(loads, dtype=float)[:, None]


@each_predictor
@settings(deadline=None, max_examples=100)
@given(rng=seeds(), steps=st.integers(1, 40), window=st.integers(1, 7))
def test_a_prediction_has_the_last_sum_and_is_never_negative(rng, steps, window, predictor):
    loads_WME = random_loads(rng, steps, 2, 5)
    predicted_ME = predicted_loads(loads_WME, predictor, window)
    assert (predicted_ME >= 0).all()
    assert np.isfinite(predicted_ME).all()
    has_any = predicted_ME.sum(1) > 0
    assert np.allclose(predicted_ME.sum(1)[has_any], loads_WME[-1].sum(1)[has_any])
    known = steps_needed(predictor, window)
    assert np.allclose(predicted_ME, predicted_loads(loads_WME[-known:], predictor, window))


@each_predictor
def test_what_does_not_change_is_predicted_as_it_is(predictor):
    assert predicted_loads(history(*[[3, 1, 0]] * 8), predictor).tolist() == [[3, 1, 0]]


def test_each_rule_on_a_load_that_rises():
    rises = history(*[[10.0 + t, 90.0 - t] for t in range(12)])
    predicted = {p: predicted_loads(rises, p)[0, 0] for p in PREDICTORS}
    assert predicted["mean"] == pytest.approx(10 + 9)
    assert predicted["last"] == pytest.approx(10 + 11)
    assert predicted["mean"] < predicted["exponential"] < predicted["last"]
    assert predicted["slope"] == pytest.approx(10 + 12)


def test_a_slope_that_was_never_right_is_not_followed():
    jumps = history(*[[10.0 + 5 * (t % 2), 90.0 - 5 * (t % 2)] for t in range(12)])
    assert predicted_loads(jumps, "slope")[0] == pytest.approx(
        predicted_loads(jumps, "mean")[0], rel=0.02
    )


def test_without_a_step_there_is_nothing_to_predict_from():
    with pytest.raises(ValueError, match="at least 1 step"):
        predicted_loads(np.zeros((0, 1, 2)), "mean")


def test_an_error_is_the_share_that_went_elsewhere():
    """Of each layer by itself, whatever its number of tokens."""
    predicted_ME = np.array([[2.0, 2, 0], [4, 0, 0], [1, 1, 2], [0, 0, 0], [1, 1, 1]])
    true_ME = np.array([[20, 10, 10], [0, 7, 1], [2, 2, 4], [5, 0, 0], [0, 0, 0]])
    assert prediction_errors(predicted_ME, true_ME).tolist() == [0.25, 1.0, 0.0, 0.0, 0.0]


@settings(deadline=None, max_examples=50)
@given(rng=seeds())
def test_an_error_lies_between_right_and_all_wrong_both_ways(rng):
    one_ME, other_ME = random_loads(rng, 2, 3, 5)
    error_M = prediction_errors(one_ME, other_ME)
    assert ((error_M >= 0) & (error_M <= 1 + 1e-12)).all()
    assert error_M == pytest.approx(prediction_errors(other_ME, one_ME))
    assert prediction_errors(one_ME, 3 * one_ME) == pytest.approx(np.zeros(3), abs=1e-12)
