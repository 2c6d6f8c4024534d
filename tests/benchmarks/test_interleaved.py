"""Turns, rounds and ratios of the interleaved timer."""

import math
import time

import pytest
import torch

from benchmarks.interleaved import MIN_ROUNDS, paired_ratio, relative_error, time_interleaved

CPU = torch.device("cpu")


def test_rounds_rotate_and_leave_the_warmup_out() -> None:
    turns: list[str] = []
    contestants = {name: lambda name=name: turns.append(name) for name in "abc"}
    untimed: list[int] = []
    # Runs of microseconds differ by more than the hopeless rule allows; sleeps do not.
    slept = {
        name: lambda run=run: (run(), time.sleep(0.002))[0] for name, run in contestants.items()
    }
    times = time_interleaved(slept, device=CPU, budget_s=0, between=lambda: untimed.append(1))
    assert "".join(turns) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(ms) for name, ms in times.items()} == dict.fromkeys("abc", MIN_ROUNDS)
    assert len(untimed) == len(turns)
    assert all(ms >= 2 for of_one in times.values() for ms in of_one)


def test_the_hopeless_are_timed_once() -> None:
    times = time_interleaved(
        {"fast": lambda: time.sleep(0.002), "slow": lambda: time.sleep(0.1)},
        device=CPU,
        budget_s=0.2,
    )
    assert len(times["slow"]) == 1
    assert len(times["fast"]) > MIN_ROUNDS


def test_ratio_pairs_rounds_so_drift_cancels() -> None:
    # The machine halves its speed from round to round; the peer always takes 1.5 times as long.
    assert paired_ratio([15, 30, 60, 120], [10, 20, 40, 80]) == 1.5
    # A peer that left after the first round is compared in that round alone.
    assert paired_ratio([50], [10, 999, 999]) == 5


def test_relative_error_is_of_the_largest_and_refuses_nan_and_shapes() -> None:
    truth = torch.tensor([1.0, -4.0])
    assert relative_error(truth.clone(), truth) == 0
    assert relative_error(torch.tensor([1.5, -4.0]), truth) == pytest.approx(0.125)
    assert math.isinf(relative_error(torch.tensor([math.nan, -4.0]), truth))
    assert math.isinf(relative_error(truth[:1], truth))
