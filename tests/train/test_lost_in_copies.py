"""A rank that is lost while copies of experts are on their way ends the job by name, and the next start goes on exactly."""

import re

import pytest

from tests.train.launched import STEPS, finish, overrides, records, run, start
from tests.train.test_resume import exact

PLACED = [
    *("placement=balanced", "placement.tolerance=0", "placement.every_steps=1"),
    "placement.calibrate=false",  # other copies sum gradients in another order: two runs would differ in last bits
]
ROUTER = "model.moe.router._target_=tests.train.faulty_router.FaultyRouter"
MICRO_STEPS, LOST_AT = 2, 13
"""A layer routes once in each; the first of a step is between the start of its gather and the wait for it."""


@pytest.mark.parity
def test_a_rank_lost_in_a_gather_is_named_and_a_resume_is_exact(tiny_data, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setenv("FAULT", "none 0 0")
    run(2, overrides(whole, tiny_data, ROUTER, *PLACED))
    words = overrides(broken, tiny_data, ROUTER, *PLACED)
    monkeypatch.setenv("FAULT", f"kill 1 {MICRO_STEPS * (LOST_AT - 1) + 1}")
    code, output = finish(start(2, words))
    assert code != 0
    (said,) = re.findall(r"^moesys: (.*)$", output, re.MULTILINE)
    assert said.startswith(f"rank 1 died at step {LOST_AT} (last seen at "), output
    assert records(broken, "train")[-1]["step"] == LOST_AT - 1
    lost = records(whole, "train")[LOST_AT - 1]
    assert lost["copies_bytes"] > 0, "the lost rank's copies were on their way"
    monkeypatch.setenv("FAULT", "none 0 0")
    run(2, words)
    assert records(broken, "start")[-1]["resumed_from_step"] == 10
    assert exact(broken) == exact(whole)
    holders = [record["expert_holders"] for record in records(whole, "train")]
    assert [record["expert_holders"] for record in records(broken, "train")] == holders
    assert len(holders) == STEPS
