"""The preflight of a job on a real Slurm: the bad node goes, and the requeued job runs without it."""

import re
import sys
from pathlib import Path

import pytest

from tests.launch.slurm import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "doctor.md"


def requeue_lines() -> str:
    """What docs/doctor.md tells a batch script to do."""
    (block,) = re.findall(r"```bash\n(# In the batch script.*?)```", PAGE.read_text(), re.DOTALL)
    return block


@pytest.mark.slurm
def test_a_job_is_requeued_without_the_node_that_must_go(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    script, log = tmp_path / "job.sbatch", tmp_path / "log"
    doctor = f"{sys.executable} -m tests.doctor.cluster_rank 'slow node' --run-dir {tmp_path}"
    lines = requeue_lines().replace("moesys doctor --cluster --quick --run-dir runs", doctor)
    assert doctor in lines
    script.write_text(
        f"#!/bin/bash\ncd {ROOT}\nexport OMP_NUM_THREADS=1\n"
        f"{lines.replace('runs/exclude', str(tmp_path / 'exclude'))}"
        'echo "trains on $SLURM_JOB_NODELIST"\n'
    )
    words = ("--nodes=3", "--ntasks-per-node=1", "--open-mode=append", f"--output={log}")
    job_id = slurm.submit(*words, script)
    job = slurm.wait(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout_s=240)
    said = log.read_text()
    assert job["JobState"] == "COMPLETED", said
    assert (job["Restarts"], job["ExcNodeList"]) == ("1", "n3"), said
    assert "FAIL  n3: links" in said
    assert said.splitlines()[-1] == "trains on n[1-2,4]"
    assert (tmp_path / "exclude").read_text() == "n3\n"
