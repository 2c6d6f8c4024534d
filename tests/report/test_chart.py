"""Axes and smoothing of a chart."""

import numpy as np
import pytest

from moesys.report.chart import smoothed, ticks


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(1, 600, 6) == [100, 200, 300, 400, 500, 600]
    assert ticks(0.11, 0.29, 4) == pytest.approx([0.15, 0.2, 0.25])


def test_smoothing_neither_lags_nor_moves_a_constant() -> None:
    assert smoothed(np.full(50, 3.0), 4) == pytest.approx(3.0)
    line = np.arange(200.0)
    assert smoothed(line, 3)[50:150] == pytest.approx(line[50:150])
    gap = np.array([1.0, np.nan, 1.0])
    assert smoothed(gap, 2) == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)
