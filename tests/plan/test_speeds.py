"""Speeds of ranks from their experts' times, by hand and at the bounds.

Shapes: S steps, P ranks.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.plan.shares import poured_over
from moesys.plan.speeds import (
    FASTEST,
    LEAST_STEPS,
    SLOWEST,
    SPEED_STEPS,
    relative_speeds,
    seconds_per_row,
)
from tests.plan.placements import seeds

ROWS = 1000


def speeds(*us_P: float, steps: int = SPEED_STEPS) -> list[float]:
    """Of ranks that take so long for `ROWS` rows in every step."""
    us_SP = np.tile(np.array(us_P, dtype=np.int64), (steps, 1))
    return relative_speeds(us_SP, np.full_like(us_SP, ROWS)).tolist()


@pytest.mark.parametrize(
    ("us_P", "expected"),
    [
        ((100, 100), [1, 1]),
        ((100, 100, 100, 200), [1.14, 1.14, 1.14, 0.57]),
        ((100, 108), [1, 1]),
        ((100, 112), [1.06, 0.94]),
        ((100, 100_000), [2.0, SLOWEST]),
        ((1, *[1000] * 7), [FASTEST, *[SLOWEST] * 7]),
        ((100, 0, 100), [1, 1, 1]),
        ((0, 0), [1, 1]),
    ],
    ids=["alike", "half", "in the band", "beyond it", "slow", "fast", "not timed", "none timed"],
)
def test_speeds_by_hand(us_P: tuple[int, ...], expected: list[float]) -> None:
    assert speeds(*us_P) == expected


def test_a_rate_is_rows_over_time() -> None:
    us_SP = np.tile([[100, 100]], (SPEED_STEPS, 1))
    rows_SP = np.tile([[300, 100]], (SPEED_STEPS, 1))
    assert relative_speeds(us_SP, rows_SP).tolist() == [1.5, 0.5]


@pytest.mark.parametrize("steps", range(LEAST_STEPS + 1))
def test_nothing_is_said_of_too_few_steps(steps: int) -> None:
    assert (speeds(100, 200, steps=steps) == [1, 1]) == (steps < LEAST_STEPS)


def test_a_rank_without_rows_is_as_fast_as_the_mean_of_the_others() -> None:
    us_SP = np.tile([[100, 200, 50]], (SPEED_STEPS, 1))
    rows_SP = np.full_like(us_SP, ROWS)
    rows_SP[LEAST_STEPS - 1 :, 2] = 0
    assert relative_speeds(us_SP, rows_SP).tolist() == [1.33, 0.67, 1]


def test_a_slow_moment_and_older_steps_change_nothing() -> None:
    us_SP = np.full((SPEED_STEPS, 3), 100)
    us_SP[1, 0] = us_SP[3, 0] = 10**7
    assert relative_speeds(us_SP, np.full_like(us_SP, ROWS)).tolist() == [1, 1, 1]
    older_SP = np.tile([[100, 900, 100]], (2 * SPEED_STEPS, 1))
    us_SP = np.concatenate([older_SP, us_SP])
    assert relative_speeds(us_SP, np.full_like(us_SP, ROWS)).tolist() == [1, 1, 1]


@given(seeds(), st.integers(1, SPEED_STEPS), st.integers(1, 8))
def test_speeds_are_in_bounds_whatever_is_told(rng, steps: int, ranks: int) -> None:
    us_SP = rng.integers(0, 10 ** int(rng.integers(1, 12)), (steps, ranks))
    rows_SP = rng.integers(0, 10 ** int(rng.integers(1, 9)), (steps, ranks))
    speeds_P = relative_speeds(us_SP, rows_SP)
    assert ((speeds_P >= SLOWEST) & (speeds_P <= FASTEST)).all()
    assert (np.abs(speeds_P * 100 - np.round(speeds_P * 100)) < 1e-9).all()


def test_times_come_level_where_a_step_costs_something_beside_rows() -> None:
    """Ranks of which one is half as fast, in 400 us and 1 or 2 a row: shares by what was measured lead to equal times."""
    rows_P, us_of_row_P = np.full(4, 1000.0), np.array([1.0, 1.0, 1.0, 2.0])
    for _ in range(8):
        us_P = 400 + us_of_row_P * rows_P
        us_SP, rows_SP = (
            np.tile(told.astype(np.int64), (SPEED_STEPS, 1)) for told in (us_P, rows_P)
        )
        rows_P = poured_over(np.zeros(4), 4000.0, relative_speeds(us_SP, rows_SP))
    us_P = 400 + us_of_row_P * rows_P
    assert us_P.max() <= 1.05 * us_P.min()


def test_a_row_takes_what_it_did_in_the_fastest_of_the_last_steps() -> None:
    """Which are five: a faster one before them, and one without rows, say nothing. Ranks' rows count together."""
    us_SP = np.array([[1, 1], [9000, 9000], [300, 100], [400, 800], [0, 0], [500, 500]])
    rows_SP = np.array([[10, 10], [10, 10], [10, 10], [40, 10], [0, 0], [20, 20]])
    assert seconds_per_row(us_SP, rows_SP) == pytest.approx(20e-6)
    assert seconds_per_row(us_SP[:3], rows_SP[:3]) == pytest.approx(0.1e-6)
    assert seconds_per_row(us_SP[4:5], rows_SP[4:5]) is None
    assert seconds_per_row(us_SP[:0], rows_SP[:0]) is None
