"""Slurm's own commands: what is asked of them, and what their answers mean.

The answers are read by pure functions; `Slurm` runs the commands. Every command may be missing: a machine
without Slurm trains too.
"""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesys.config.errors import Problem, did_you_mean
from moesys.launch.status import State, Status

_ENDS: Mapping[str, tuple[State, str]] = {
    "OUT_OF_MEMORY": ("oom", "Slurm: more memory than the job asked for"),
    "TIMEOUT": ("timeout", "Slurm: the time limit"),
    "DEADLINE": ("timeout", "Slurm: the deadline"),
    "NODE_FAIL": ("failed", "Slurm: a node failed"),
    "BOOT_FAIL": ("failed", "Slurm: a node did not start"),
    "FAILED": ("failed", "Slurm: the batch script failed"),
    "CANCELLED": ("failed", "cancelled"),
    "PREEMPTED": ("failed", "Slurm: preempted by another job"),
    "REVOKED": ("failed", "Slurm: revoked"),
    "COMPLETED": ("failed", "the batch script ended before the run did"),
}
"""What a job that is over says about a run that did not say how it ended."""
_ACTIVE: tuple[State, ...] = ("queued", "running", "requeued")


def news(status: Status, slurm_state: str | None) -> tuple[State, str] | None:
    """What Slurm knows about a run and the run's status does not: state and reason. None = nothing new.

    Args:
        slurm_state: of the run's job, as in squeue or sacct; None = neither knows the job.
    """
    if slurm_state is None:
        return None
    word = slurm_state.split()[0].rstrip("+")  # "CANCELLED by 1000", and what sacct cuts off
    if word == "PENDING":
        return ("requeued", "by Slurm") if status.state == "running" else None
    end = _ENDS.get(word)
    if end is None or (status.state not in _ACTIVE and end[0] not in ("oom", "timeout")):
        return None
    return end if status.state in _ACTIVE or status.state == "failed" else None


def partition_problem(partition: str | None, nodes: int, answer: str) -> Problem | None:
    """What is wrong with asking for nodes of a partition, after `sinfo --noheader --format=%P|%D`.

    A partition has a line for each state of its nodes; the default one is marked with a star.
    """
    sizes: dict[str, int] = {}
    default = None
    for line in answer.splitlines():
        name, _, count = line.partition("|")
        if name.endswith("*"):
            name = default = name.removesuffix("*")
        sizes[name] = sizes.get(name, 0) + int(count)
    if partition is not None and partition not in sizes:
        return Problem(
            key="cluster.partition",
            given=partition,
            rule=f"must be one of {', '.join(sorted(sizes))}",
            fix=did_you_mean(partition, sizes),
        )
    name = partition or default
    if name is not None and nodes > sizes[name]:
        return Problem(
            key="nodes",
            given=nodes,
            rule=f"must be at most the {sizes[name]} nodes of partition {name}",
            fix=f"use nodes={sizes[name]} or fewer, or another partition",
        )
    return None


@dataclass(frozen=True)
class SlurmError(Exception):
    """A command of Slurm that was refused, with what it said."""

    command: str
    said: str

    def __str__(self) -> str:
        return f"{self.command}: {self.said}"


def has(command: str) -> bool:
    return shutil.which(command) is not None


def ask(*words: str, timeout_s: float = 60.0) -> str:
    """What a command prints. Raises SlurmError where it ends with an error, is not there or does not answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)
    except FileNotFoundError:
        raise SlurmError(words[0], "is not installed on this machine") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(words[0], f"did not answer in {timeout_s:.0f} s") from None
    if done.returncode:
        raise SlurmError(words[0], " ".join((done.stderr or done.stdout).split()))
    return done.stdout


def find_partition_problem(partition: str | None, nodes: int) -> Problem | None:
    """None too where sinfo is missing or does not answer: sbatch will say what it thinks."""
    try:
        answer = ask("sinfo", "--noheader", "--format=%P|%D")
    except SlurmError:
        return None
    return partition_problem(partition, nodes, answer)


def submit_held(script: Path, *options: str) -> str:
    """The id of the job, which waits for `release`: time to write the id down before it can run."""
    return ask("sbatch", "--parsable", "--hold", *options, str(script)).strip().partition(";")[0]


def release(job_id: str) -> None:
    ask("scontrol", "release", job_id)


def stop_and_save(job_id: str) -> None:
    """The signal of the time limit to the batch script, after which the job does not come back."""
    ask("scontrol", "update", f"JobId={job_id}", "Requeue=0")
    ask("scancel", "--signal=USR2", "--batch", job_id)


def cancel(job_id: str) -> None:
    """Whether it waits or runs; what runs gets SIGTERM, and SIGKILL after the cluster's KillWait."""
    ask("scancel", job_id)


def is_alive(job_id: str) -> bool:
    """Whether Slurm says that the job runs, ends or waits. False too where it is not to be asked."""
    word = states([job_id]).get(job_id, "").split()
    return bool(word) and word[0].rstrip("+") not in _ENDS


def states(job_ids: Sequence[str]) -> dict[str, str]:
    """Slurm's word for each job that it still knows: squeue first, then the accounting where there is one."""
    found: dict[str, str] = {}
    for command in (
        ("squeue", "--me", "--states=all", "--array", "--noheader", "--format=%i|%T"),
        ("sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State"),
    ):
        missing = [job_id for job_id in job_ids if job_id not in found]
        if not missing:
            break
        wanted = ("--jobs=" + ",".join(missing),) if command[0] == "sacct" else ()
        try:
            answer = ask(*command, *wanted)
        except SlurmError:
            continue
        lines = (line.partition("|") for line in answer.splitlines())
        # Of a heterogeneous job the first component, 17+0, is the job.
        found |= {job_id.removesuffix("+0"): state for job_id, _, state in lines if state}
    return {job_id: found[job_id] for job_id in job_ids if job_id in found}
