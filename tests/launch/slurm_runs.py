"""Runs that `moesys launch` queues on the virtual cluster: their words, where they are, and a brake."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from moesys.launch.status import Status, read_status
from tests.launch.braked_router import VARIABLE
from tests.launch.slurm import SlurmCluster
from tests.train.launched import overrides, records

Moesys = Callable[..., str]
WAIT_S = 600.0
ROUTER = "model.moe.router._target_=tests.launch.braked_router.BrakedRouter"


def words(run_dir: Path, data: Path, *more: str) -> list[str]:
    """Of a run on two nodes of two ranks whose folder has a name that a shell would split."""
    mine = [word for word in overrides(run_dir, data, *more) if not word.startswith("run.dir=")]
    return ["launch", "cluster=local", "nodes=2", *mine, f'run.dir="{run_dir}"']


def launch(moesys: Moesys, run_dir: Path, data: Path, *more: str) -> int:
    """The id of the job."""
    said = moesys(*words(run_dir, data, ROUTER, *more))
    return int(said.split("job ")[1].split()[0])


class Brake:
    """A file at whose sight every rank waits a moment in each step: a test is then faster than the run."""

    def __init__(self, path: Path, wait_s: float = 0.2) -> None:
        self.path = path
        path.write_text(str(wait_s))

    def words(self) -> list[str]:
        """For the launch. The losses are the same, braked or not."""
        return [f"cluster.env={{{VARIABLE}: '{self.path}'}}"]

    def release(self) -> None:
        self.path.unlink()


def wait_for(run_dir: Path, what: Callable[[], bool], timeout_s: float = WAIT_S) -> Status | None:
    """The run's status, once it is so. AssertionError with the run's log if that is too late."""
    deadline = time.monotonic() + timeout_s
    while not what():
        log = "\n".join(path.read_text() for path in run_dir.glob("slurm-*.log"))
        assert time.monotonic() < deadline, f"{read_status(run_dir)}\n{log}"
        time.sleep(0.1)
    return read_status(run_dir)


def state(run_dir: Path) -> str | None:
    status = read_status(run_dir)
    return status.state if status else None


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in records(run_dir, "train")]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """Of each record of a step, in the file's order."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(run_dir, "train")]


def row_of(moesys: Moesys, run_dir: Path) -> dict:
    """What `moesys runs list` says of the run."""
    rows = json.loads(moesys("runs", "list", run_dir.parent, "--json"))
    (row,) = [row for row in rows if row["name"] == run_dir.name]
    return row


def process_of_rank(slurm: SlurmCluster, job_id: int, rank: int) -> psutil.Process:
    """The process of a rank of a job, from Slurm's variables in its environment."""
    wanted = {
        "SLURM_CONF": slurm.environment["SLURM_CONF"],
        "SLURM_JOB_ID": str(job_id),
        "SLURM_PROCID": str(rank),
    }
    for process in psutil.process_iter(["environ", "cmdline"]):
        environ = process.info["environ"] or {}
        is_task = "SLURM_STEP_NUM_TASKS" in environ and "moesys.train" in process.info["cmdline"]
        if is_task and wanted.items() <= environ.items():
            return process
    raise AssertionError(f"job {job_id} has no rank {rank}")
