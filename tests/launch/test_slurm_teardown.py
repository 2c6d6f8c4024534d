"""Nothing of a virtual cluster outlives it. A file of its own: only one cluster runs at a time."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.launch.slurm import missing

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_outlives_a_block_that_fails() -> None:
    if reason := missing():
        pytest.skip(reason)
    code = (
        "from tests.launch.slurm import slurm_cluster\n"
        "with slurm_cluster(nodes=1) as slurm:\n"
        "    print(slurm.folder, flush=True)\n"
        "    slurm.submit('--wrap=sleep 600')\n"
        "    raise SystemExit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    folder = done.stdout.strip()
    assert "moesys-slurm-" in folder
    assert not Path(folder).exists()
    left = [p for p in psutil.process_iter(["environ"]) if folder in str(p.info["environ"])]
    assert not left


def test_without_slurm_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.launch.slurm._which", lambda name: None)
    reason = missing()
    assert reason is not None
    assert "root" in reason or "apt-get install slurm-wlm munge" in reason
