"""The virtual cluster: jobs run on several of its nodes and are requeued."""

from pathlib import Path

from tests.launch.slurm import SlurmCluster


def test_tasks_run_on_every_node(slurm: SlurmCluster) -> None:
    said = slurm.run("srun", "--nodes=4", "--ntasks-per-node=2", "printenv", "SLURMD_NODENAME")
    assert sorted(said.split()) == ["n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4"]


def test_a_job_is_requeued(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text('#!/bin/sh\ntest "$SLURM_RESTART_COUNT" = 1 && exit 0\nsleep 600\n')
    job_id = slurm.submit("--nodes=2", f"--output={tmp_path / 'log'}", script)
    slurm.wait(job_id, "RUNNING")
    slurm.run("scontrol", "requeue", str(job_id))
    assert slurm.wait(job_id, "COMPLETED")["Restarts"] == "1"
