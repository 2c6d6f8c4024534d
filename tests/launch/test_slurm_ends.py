"""Runs on Slurm that cannot go on by themselves: no memory, no time, a rank that dies each time. Each one's end is told."""

import signal
from pathlib import Path

import pytest

from tests.launch.slurm import SlurmCluster
from tests.launch.slurm_runs import (
    Brake,
    Moesys,
    launch,
    process_of_rank,
    row_of,
    state,
    steps,
    wait_for,
)
from tests.train.launched import records

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
STEPS = 20


def test_a_rank_that_needs_more_memory_than_the_job_has(
    moesys: Moesys, slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job_id = launch(
        moesys,
        run,
        tiny_data,
        "train.steps=1000",
        "model.moe.router._target_=tests.launch.hungry_router.HungryRouter",
        "cluster.env={MOESYS_TEST_HUNGER: '3'}",
        "cluster.memory_gib_per_node=3",
    )
    status = wait_for(run, lambda: state(run) == "oom")
    assert status is not None
    assert "exceeded memory limit" in status.reason
    assert "cluster.memory_gib_per_node" in status.reason
    slurm.wait(job_id, "FAILED")
    assert row_of(moesys, run)["state"] == "oom"
    # What has no room has none the second time.
    assert len(records(run, "start")) == 1


def test_a_time_limit_without_time_to_save(
    moesys: Moesys, slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    """Every rank is stopped, as on a file system that hangs: the limit comes, Slurm ends them, the checkpoint is there."""
    run, brake = tmp_path / "run", Brake(tmp_path / "brake")
    job_id = launch(moesys, run, tiny_data, f"train.steps={STEPS}", *brake.words())
    wait_for(run, lambda: len(steps(run)) > 6)
    for rank in range(4):
        process_of_rank(slurm, job_id, rank).send_signal(signal.SIGSTOP)
    slurm.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=1")
    slurm.wait(job_id, "TIMEOUT")
    row = row_of(moesys, run)
    assert (row["state"], row["reason"]) == ("timeout", "Slurm: the time limit")
    brake.release()
    moesys("runs", "resubmit", run)
    wait_for(run, lambda: state(run) == "done")
    assert steps(run) == list(range(1, STEPS + 1))


def test_a_rank_that_dies_each_time_ends_the_run(
    moesys: Moesys, slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    """Without a checkpoint in between the second death is the last that `cluster.restarts` allows."""
    run, brake = tmp_path / "run", Brake(tmp_path / "brake")
    job_id = launch(
        moesys,
        run,
        tiny_data,
        "train.steps=1000",
        "checkpoint.every_steps=500",
        "cluster.restarts=1",
        *brake.words(),
    )
    for number in (1, 2):
        wait_for(run, lambda number=number: len(records(run, "start")) == number)
        process_of_rank(slurm, job_id, 3).kill()
    slurm.wait(job_id, "FAILED")
    row = row_of(moesys, run)
    assert (row["state"], row["attempt"]) == ("failed", 2)
    assert row["reason"].startswith("rank 3 died")
