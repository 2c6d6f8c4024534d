"""Uplinks at which exchanges of rows take a wanted share of a step."""

from dataclasses import replace

import pytest

from benchmarks.fabric.layout import Layout
from benchmarks.shaping import Crossing, Shaping, StepTimes, crossing_at, mean_of, rate_for

FREE = StepTimes(plain_ms=1100.0, staying_ms=1000.0)


def steps_at(rate_bits: float) -> StepTimes:
    """Where rows add 600 ms and gradients 200 at 8 Mbit/s."""
    slower = 8e6 / rate_bits
    return StepTimes(plain_ms=1100 + 800 * slower, staying_ms=1000 + 200 * slower)


@pytest.mark.parametrize("share_pct", [20, 45, 70])
def test_a_rate_makes_the_share(share_pct: int) -> None:
    """From steps at any rate."""
    crossing = crossing_at(5e6, steps_at(5e6), FREE)
    found = steps_at(rate_for(share_pct, FREE, crossing))
    assert found.rows_ms / found.plain_ms == pytest.approx(share_pct / 100)


def test_tries_at_all_rates_are_worth_the_same() -> None:
    """One that finds twice the time, one that finds none of it."""
    known = [crossing_at(rate, steps_at(rate), FREE) for rate in (5e6, 20e6)]
    mean = mean_of(known)
    assert mean.rows_ms == pytest.approx(600 * 8e6)
    assert mean.other_ms == pytest.approx(200 * 8e6)
    twice = replace(known[0], rows_ms=2 * known[0].rows_ms)
    assert mean_of([twice, known[1]]).rows_ms == pytest.approx(1.5 * 600 * 8e6)


def test_a_share_that_no_rate_makes() -> None:
    """Gradients, too, take longer: of what crosses, three quarters are rows."""
    crossing = crossing_at(8e6, steps_at(8e6), FREE)
    with pytest.raises(ValueError, match=r"never take 80 % of a step: all else adds 0.33 times"):
        rate_for(80, FREE, crossing)
    assert rate_for(5, FREE, crossing) > 1e8, "rows take more than that at any rate"


def test_tries_come_nearer() -> None:
    """From a guess that is ten times off, with a first try at a rate that it says."""
    tried: list[Layout] = []

    def measure(layout: Layout) -> StepTimes:
        assert layout.inter_bits is not None
        tried.append(layout)
        return steps_at(layout.inter_bits)

    shaping = Shaping(
        layout=Layout(num_nodes=4, ranks_per_node=2),
        measure=measure,
        free=FREE,
        guess=Crossing(rate_bits=8e7, rows_ms=600.0),
        tries=3,
        progress=lambda line: None,
    )
    found = shaping.to(45)
    assert found.inter_bits is not None
    assert steps_at(found.inter_bits).share_pct == pytest.approx(45, abs=0.01)
    assert len(tried) == 2, "the second is near enough"
