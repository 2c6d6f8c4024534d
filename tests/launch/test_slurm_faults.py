"""What is lost under a run on Slurm: a rank, srun, slurmstepd, a node, memory, time. It goes on exactly, or says why not."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from moesys.launch.status import read_status
from tests.launch.slurm import SlurmCluster
from tests.launch.slurm_runs import (
    Brake,
    Moesys,
    launch,
    losses,
    process_of_rank,
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
) -> Callable[[int], list[tuple[int, float, float]]]:
    """undisturbed(nodes): the losses of a run on so many nodes of two ranks, to its end."""
    known: dict[int, list] = {}

    def of(nodes: int) -> list[tuple[int, float, float]]:
        if nodes not in known:
            run = tmp_path_factory.mktemp("runs") / f"undisturbed-{nodes}"
            launch(moesys, run, tiny_data, f"train.steps={STEPS}", f"nodes={nodes}")
            wait_for(run, lambda: state(run) in ("done", "failed"))
            known[nodes] = losses(run)
            assert [step for step, *_ in known[nodes]] == list(range(1, STEPS + 1))
        return known[nodes]

    return of


def srun_of(slurm: SlurmCluster, job_id: int) -> psutil.Process:
    """The one that the batch script started; it has one of its own below it."""
    wanted = {"SLURM_CONF": slurm.environment["SLURM_CONF"], "SLURM_JOB_ID": str(job_id)}
    found = {
        process.pid: process
        for process in psutil.process_iter(["name", "environ"])
        if process.info["name"] == "srun" and wanted.items() <= process.info["environ"].items()
    }
    (first,) = [process for process in found.values() if process.ppid() not in found]
    return first


def test_whatever_is_killed_the_ranks_start_again_in_place(
    moesys: Moesys, slurm: SlurmCluster, undisturbed: Callable, tiny_data: Path, tmp_path: Path
) -> None:
    """A rank, the rank that writes, srun, and slurmstepd, which carries the ranks of the second node."""
    run, brake = tmp_path / "run", Brake(tmp_path / "brake")
    expected = undisturbed(2)
    job_id = launch(moesys, run, tiny_data, f"train.steps={STEPS}", *brake.words())
    victims: list[Callable[[], psutil.Process | None]] = [
        lambda: process_of_rank(slurm, job_id, 3),
        lambda: process_of_rank(slurm, job_id, 0),
        lambda: srun_of(slurm, job_id),
        lambda: process_of_rank(slurm, job_id, 2).parent(),
    ]
    for number, victim in enumerate(victims, start=1):
        before = steps(run)[-1] if steps(run) else 0
        # Behind the next checkpoint.
        wait_for(run, lambda before=before: (steps(run) or [0])[-1] > before + 5)
        found = victim()
        assert found is not None
        found.kill()
        wait_for(run, lambda number=number: len(records(run, "start")) > number)
    brake.release()
    wait_for(run, lambda: state(run) == "done")
    assert losses(run) == expected
    status = read_status(run)
    assert status is not None
    assert status.attempt == 5
    assert slurm.wait(job_id, "COMPLETED")["Restarts"] == "0"
