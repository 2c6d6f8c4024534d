"""A checkpoint that is written while steps go on holds them up by less than a twentieth of a step, on quickstart's model."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests import figures
from tests.train.launched import records, run

STEPS, EVERY_STEPS = 31, 5


@pytest.mark.parity  # a figure of a quiet machine
@pytest.mark.timeout(400)
def test_a_save_stalls_a_step_by_less_than_5_percent(tmp_path: Path) -> None:
    data, folder = tmp_path / "stdlib", tmp_path / "run"
    prep = ["prep", "--input", "stdlib", "--vocab-size", "2048", "--output", str(data)]
    subprocess.run([sys.executable, "-m", "moesys", *prep], check=True, capture_output=True)
    run(
        2,
        [
            *("experiment=quickstart", f"data.path={data}", f"run.dir={folder}"),
            *(f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY_STEPS}"),
            *("schedule.warmup_steps=5", "train.eval_tokens=2048", "train.eval_every_steps=0"),
        ],
    )
    step_ms = statistics.median(r["step_ms"] for r in records(folder, "train"))
    # The last one is waited for to its end: the job has nothing else to do.
    stalls_ms = [r["checkpoint_ms"] for r in records(folder, "checkpoint") if r["step"] < STEPS]
    assert len(stalls_ms) == (STEPS - 1) // EVERY_STEPS
    stall_pct = 100 * statistics.median(stalls_ms) / step_ms
    figures.worst("save_stall_pct", stall_pct)
    assert stall_pct < 5, (stalls_ms, step_ms)
