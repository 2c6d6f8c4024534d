"""Runs that Slurm, or a signal through Slurm, stops: each goes on, with the losses of one that nobody stopped."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moesys.launch.status import read_status
from tests.launch.slurm import SlurmCluster
from tests.launch.slurm_runs import (
    Brake,
    Moesys,
    launch,
    losses,
    row_of,
    state,
    steps,
    wait_for,
)
from tests.train.launched import records

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
STEPS = 40


@pytest.fixture(scope="module")
def undisturbed(
    moesys: Moesys, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[int, float, float]]:
    """The losses of a run on two nodes of two ranks, to its end."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    launch(moesys, run, tiny_data, f"train.steps={STEPS}")
    wait_for(run, lambda: state(run) in ("done", "failed"))
    row = row_of(moesys, run)
    assert (row["state"], row["step"], row["steps"], row["attempt"]) == ("done", STEPS, STEPS, 1)
    (start,) = records(run, "start")
    assert (start["nodes"], start["launcher"]) == (["n1", "n2"], "srun")
    found = losses(run)
    assert [step for step, *_ in found] == list(range(1, STEPS + 1))
    return found


def test_five_requeues_in_a_row(
    moesys: Moesys, slurm: SlurmCluster, undisturbed: list, tiny_data: Path, tmp_path: Path
) -> None:
    """By each signal, to the batch script, as at a time limit, and to the ranks, and by Slurm itself."""
    run, brake = tmp_path / "run", Brake(tmp_path / "brake")
    job_id = launch(moesys, run, tiny_data, f"train.steps={STEPS}", *brake.words())
    stops: list[Callable[[], str]] = [
        lambda: slurm.run("scancel", "--signal=USR1", "--batch", str(job_id)),
        lambda: slurm.run("scancel", "--signal=TERM", "--batch", str(job_id)),
        lambda: slurm.run("scancel", "--signal=USR2", str(job_id)),
        lambda: slurm.run("scancel", "--signal=TERM", f"{job_id}.0"),
        lambda: slurm.run("scontrol", "requeue", str(job_id)),
    ]
    for number, stop in enumerate(stops, start=1):
        before = len(steps(run))
        wait_for(run, lambda before=before: len(steps(run)) > before + 1)
        stop()
        status = wait_for(run, lambda: state(run) in ("requeued", "failed"))
        assert status is not None
        assert (number, status.state, status.attempt) == (number, "requeued", number)
    brake.release()
    wait_for(run, lambda: state(run) in ("done", "failed"))
    assert losses(run) == undisturbed
    status = read_status(run)
    assert status is not None
    assert (status.state, status.attempt) == ("done", 6)
    assert slurm.wait(job_id, "COMPLETED")["Restarts"] == "5"


def test_a_time_limit(
    moesys: Moesys, slurm: SlurmCluster, undisturbed: list, tiny_data: Path, tmp_path: Path
) -> None:
    """Slurm itself sends the signal, `cluster.grace_s` before the limit."""
    run, brake = tmp_path / "run", Brake(tmp_path / "brake", wait_s=2.0)
    words = ("cluster.grace_s=30", 'cluster.time_limit="00:10:00"')
    job_id = launch(moesys, run, tiny_data, f"train.steps={STEPS}", *words, *brake.words())
    wait_for(run, lambda: len(steps(run)) > 2)
    # As little as it has used so far, up to the whole minute.
    minutes = 1 + slurm_minutes(slurm.job(job_id)["RunTime"])
    slurm.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes}")
    status = wait_for(run, lambda: state(run) in ("requeued", "failed", "timeout"))
    assert status is not None
    assert status.state == "requeued"
    assert status.reason.startswith("stopped by SIGUSR1 at step")
    slurm.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=60")
    brake.release()
    wait_for(run, lambda: state(run) == "done")
    assert losses(run) == undisturbed
    assert slurm.wait(job_id, "COMPLETED")["Restarts"] == "1"


def slurm_minutes(clock: str) -> int:
    """Of HH:MM:SS."""
    hours, minutes, _ = clock.split(":")
    return 60 * int(hours) + int(minutes)


def test_a_node_goes_down(
    moesys: Moesys, slurm: SlurmCluster, tiny_data: Path, tmp_path: Path
) -> None:
    """All four nodes of two ranks: the job waits until the node is back, and goes on."""
    wide = ("nodes=4", "train.steps=12", "train.global_batch_tokens=1024")
    expected = tmp_path / "undisturbed"
    launch(moesys, expected, tiny_data, *wide)
    wait_for(expected, lambda: state(expected) in ("done", "failed"))
    run, brake = tmp_path / "run", Brake(tmp_path / "brake")
    job_id = launch(moesys, run, tiny_data, *wide, *brake.words())
    wait_for(run, lambda: len(steps(run)) > 6)
    slurm.run("scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=test")
    slurm.wait(job_id, "PENDING")
    assert row_of(moesys, run)["state"] == "requeued"
    brake.release()
    # Refused where the node's slurmd has said meanwhile that it is well (ReturnToService=2).
    slurm.run("scontrol", "update", "NodeName=n3", "State=RESUME", check=False)
    wait_for(run, lambda: state(run) == "done")
    assert losses(run) == losses(expected)
    assert [step for step, *_ in losses(run)] == list(range(1, 13))
    assert slurm.wait(job_id, "COMPLETED")["Restarts"] == "1"
