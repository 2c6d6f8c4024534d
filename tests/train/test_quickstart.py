"""The first run that a newcomer makes, whole: real text, two ranks, minutes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 360.0
"""Where a rank multiplies matrices at USUAL_TFLOPS; longer where the machine is slower, or shared."""
USUAL_TFLOPS = 0.09


@pytest.mark.whole
@pytest.mark.timeout(900)
def test_quickstart_learns_in_six_minutes(tmp_path):
    began = time.monotonic()
    data, run_dir = tmp_path / "stdlib", tmp_path / "run"
    moesys = [sys.executable, "-m", "moesys"]
    launch = ["launch/run.sh", "--nproc", "2"]
    for command in (
        [*moesys, "prep", "--input", "stdlib", "--vocab-size", "2048", "--output", str(data)],
        [*launch, "experiment=quickstart", f"data.path={data}", f"run.dir={run_dir}"],
        [*moesys, "report", str(run_dir)],
    ):
        environment = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    elapsed_s = time.monotonic() - began

    manifest = json.loads((data / "manifest.json").read_text())
    assert sum(split["bytes"] for split in manifest["splits"].values()) > 8_000_000
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["val_bits_per_byte"] <= 0.6 * summary["unigram_bits_per_byte"], summary
    assert summary["world_size"] == 2
    assert summary["parameters"] >= 10_000_000
    assert summary["active_parameters"] < 0.5 * summary["parameters"]
    start = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert start["ep"] == 2
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[1])
    assert len(last["expert_load"][0]) >= 8
    assert (run_dir / "report.html").stat().st_size > 10_000
    limit_s = LIMIT_S * max(1.0, USUAL_TFLOPS / start["peak_tflops"])
    assert elapsed_s <= limit_s, f"{elapsed_s:.0f} s, at most {limit_s:.0f}; {summary}"
