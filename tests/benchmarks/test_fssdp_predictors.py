"""Predictors of loads beside each other: on loads of which the best prediction is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fssdp import predictors
from benchmarks.fssdp.loads import linear_drift
from benchmarks.fssdp.predictors import DRAWN_SLOTS, KNOWN_STEPS, distance, levels, rows_of
from moesys.plan.load_prediction import PREDICTORS

LOADS_E = np.array([700, 100, 100, 100, 50, 50, 30, 20, 10, 10, 10, 10, 5, 5, 0, 0])


def constant(steps: int = KNOWN_STEPS + 12) -> np.ndarray:
    """[S, M, E] of two layers."""
    return np.stack([np.stack([LOADS_E, LOADS_E[::-1]])] * steps)


def test_loads_that_stay_are_known() -> None:
    rows = rows_of("stay", constant(), every_steps=4)
    assert [row["predictor"] for row in rows] == list(PREDICTORS)
    for row in rows:
        assert (row["distance"], row["steps"]) == (0, 3)
        assert row["max_over_mean"] == row["if_loads_known"] < row["owners_alone"]
        assert row["owners_alone"] == round(8 * 800 / 1200, 4)


def test_after_a_jump_the_last_step_knows_most() -> None:
    """Expert 0's load is with expert 9 from the second step before on: 3 of the mean's 5 are of the other time."""
    loads_SME = constant(KNOWN_STEPS + 1)
    loads_SME[KNOWN_STEPS - 2 :] = np.roll(loads_SME[KNOWN_STEPS - 2 :], 9, axis=2)
    rows = {row["predictor"]: row for row in rows_of("jump", loads_SME)}
    assert rows["last"]["distance"] == 0
    before_ME, after_ME = loads_SME[0], loads_SME[-1]
    assert rows["mean"]["distance"] == pytest.approx(0.6 * distance(before_ME, after_ME), abs=1e-4)
    assert rows["last"]["max_over_mean"] == rows["last"]["if_loads_known"]
    assert rows["mean"]["max_over_mean"] > rows["mean"]["if_loads_known"]


def test_of_a_jump_that_nobody_saw_the_bound_knows() -> None:
    loads_SME = constant(KNOWN_STEPS + 1)
    loads_SME[-1] = np.roll(loads_SME[-1], 9, axis=1)
    bound = round(levels(loads_SME[-1], loads_SME[-1].astype(np.float64)), 4)
    for row in rows_of("jump", loads_SME):
        assert row["distance"] == pytest.approx(distance(loads_SME[0], loads_SME[-1]), abs=1e-4)
        assert row["if_loads_known"] == bound < row["max_over_mean"]


def test_distance_is_the_part_of_rows_that_goes_elsewhere() -> None:
    here_ME = np.array([[10, 10], [30, 0]])
    assert distance(np.array([[1.0, 1.0], [0.5, 0.5]]), here_ME) == pytest.approx((0 + 0.5) / 2)


def test_a_plan_from_other_loads_is_worse() -> None:
    loads_ME = constant()[0]
    known = levels(loads_ME, loads_ME.astype(np.float64))
    wrong = levels(loads_ME, loads_ME[:, ::-1].astype(np.float64))
    assert known < wrong <= levels(loads_ME, None)


def test_loads_of_a_run_folder(tmp_path: Path) -> None:
    records = [{"kind": "train", "expert_load": load_ME.tolist()} for load_ME in constant()]
    lines = [json.dumps(record) for record in [{"kind": "start"}, *records, {"kind": "eval"}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    rows = predictors.predictor_rows({"a run": tmp_path}, every_steps=40)
    names = list(dict.fromkeys(row["loads"] for row in rows))
    assert names == ["a run", *predictors.drawn_loads()]
    assert rows[: len(PREDICTORS)] == rows_of("a run", constant(), every_steps=40)


def test_too_few_steps() -> None:
    with pytest.raises(ValueError, match=f"short has 5 steps.* from step {KNOWN_STEPS + 1} on"):
        rows_of("short", constant(5))


def test_linear_drift_is_straight_from_corner_to_corner() -> None:
    shares_E = np.array([0.7, 0.2, 0.1])
    shares_SE = linear_drift(np.random.default_rng(3), 30, shares_E, lap_steps=10)
    for corner in (0, 10, 20):
        assert sorted(shares_SE[corner].tolist()) == pytest.approx([0.1, 0.2, 0.7])
    steps_SE = np.diff(shares_SE, axis=0)
    assert steps_SE == pytest.approx(np.repeat(steps_SE[::10], 10, axis=0)[:29])
    assert np.abs(steps_SE[[0, 10, 20]]).sum() > 0


def test_drawn_loads_are_what_they_are_called() -> None:
    loads = predictors.drawn_loads()
    for loads_SME in loads.values():
        assert (loads_SME.sum(2) == DRAWN_SLOTS).all()
    halves = {
        name: distance(loads_SME[:50].sum(0), loads_SME[-50:].sum(0))
        for name, loads_SME in loads.items()
    }
    assert halves["stationary"] < 0.03, "noise alone"
    assert min(halves[name] for name in halves if name != "stationary") > 0.05
    hottest_SM = loads["hotspot moves"].argmax(2)
    assert (hottest_SM[:25] == hottest_SM[0]).all()
    assert (hottest_SM[::25] != hottest_SM[0]).any()
