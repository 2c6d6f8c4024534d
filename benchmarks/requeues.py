"""Five requeues in a row on a real Slurm: is every step between them, bit by bit, that of a job left alone?"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT
from moesys.launch.status import read_status
from moesys.train.metrics import FILE_NAME
from tests.launch.slurm import SlurmCluster, slurm_cluster

NODES = 2
REQUEUES = 5
STEPS = 400
_WAIT_S = 300.0
_STEPS_BEFORE = 3
"""Of a start, before it is stopped again."""


def requeue_five_times(
    overrides: Sequence[str],
    folder: Path,
    progress: Callable[[str], None],
    requeues: int = REQUEUES,
) -> dict[str, int]:
    """A job on two virtual nodes left alone, and one that the signal of the time limit stops again and again.

    `overrides` say nothing of run.dir and train.steps.

    Raises:
        ValueError: one of the two did not end well; says where its log is.
    """
    with slurm_cluster(nodes=NODES) as slurm:
        alone, stopped = folder / "alone", folder / "stopped"
        for run in (alone, stopped):
            words = [*overrides, f"run.dir={run}", f"train.steps={STEPS}"]
            _launch(slurm, words)
            if run == stopped:
                _stop_again_and_again(slurm, run, requeues, progress)
            _wait(run, lambda run=run: _state(run) == "done", "is not done")
            progress(f"requeues: {run.name}: done")
    found = {run: _records(run) for run in (alone, stopped)}
    exact = exact_requeues(found[alone], found[stopped])
    return {
        "requeues": requeues,
        "requeues_exact": exact,
        "nodes": NODES,
        "ranks": next(r["world_size"] for r in found[alone] if r["kind"] == "start"),
        "requeued_steps": STEPS,
    }


def exact_requeues(alone: Sequence[Mapping[str, Any]], stopped: Sequence[Mapping[str, Any]]) -> int:
    """Starts after the first whose steps all have the losses of the job left alone. Pure.

    None at all if a step is missing or there twice.
    """
    wanted = {r["step"]: r["loss"] for r in alone if r["kind"] == "train"}
    steps = [r["step"] for r in stopped if r["kind"] == "train"]
    if steps != list(wanted):
        return 0
    segments: list[list[bool]] = []
    for record in stopped:
        if record["kind"] == "start":
            segments.append([])
        elif record["kind"] == "train":
            segments[-1].append(record["loss"] == wanted[record["step"]])
    return sum(bool(equal) and all(equal) for equal in segments[1:])


def _stop_again_and_again(
    slurm: SlurmCluster, run: Path, requeues: int, progress: Callable[[str], None]
) -> None:
    for number in range(1, requeues + 1):
        _wait(run, lambda n=number: _begun(run, n), f"does not begin start {number}")
        status = read_status(run)
        assert status is not None
        # What the time limit sends to the batch script.
        slurm.run("scancel", "--signal=USR2", "--batch", str(status.job_id))
        progress(f"requeues: [{number}/{requeues}]")


def _begun(run: Path, start: int) -> bool:
    """Whether start number `start` has done some steps."""
    kinds = [record["kind"] for record in _records(run)]
    if kinds.count("start") < start:
        return False
    last = len(kinds) - kinds[::-1].index("start")
    return kinds[last:].count("train") >= _STEPS_BEFORE


def _launch(slurm: SlurmCluster, overrides: Sequence[str]) -> None:
    command = [sys.executable, "-m", "moesys", "launch", "cluster=local", f"nodes={NODES}"]
    done = subprocess.run(
        [*command, *overrides],
        cwd=ROOT,
        env=dict(slurm.environment),
        capture_output=True,
        text=True,
        timeout=_WAIT_S,
    )
    if done.returncode != 0:
        raise ValueError(f"moesys launch ended with {done.returncode}: {done.stdout}{done.stderr}")


def _state(run: Path) -> str | None:
    status = read_status(run)
    if status is not None and status.state == "failed":
        raise ValueError(f"{run}: failed: {status.reason}; see {run}/slurm-*.log")
    return status and status.state


def _wait(run: Path, what: Callable[[], bool], otherwise: str) -> None:
    until_s = time.monotonic() + _WAIT_S
    while not what():
        _state(run)
        if time.monotonic() > until_s:
            raise ValueError(
                f"{run} {otherwise} within {_WAIT_S:g} s: {read_status(run)}; see {run}/slurm-*.log"
            )
        time.sleep(0.1)


def _records(run: Path) -> list[dict[str, Any]]:
    """Those that are whole."""
    path = run / FILE_NAME
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
