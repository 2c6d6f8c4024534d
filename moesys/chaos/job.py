"""A training job with faults, under torchrun, watched to its end and started again where torchrun gave up."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesys.chaos import disk, processes
from moesys.chaos.eye import Eye
from moesys.chaos.faults import Fault, format_faults
from moesys.chaos.inject import MARKERS, VARIABLE
from moesys.chaos.outcome import Event, Outcome, Sample, growth, outcomes
from moesys.chaos.processes import Leaks
from moesys.launch.snapshot import launch_folder
from moesys.report.goodput import ledger_of
from moesys.report.records import read_records
from moesys.train.exit_codes import DONE_EXIT_CODE
from moesys.train.metrics import FILE_NAME

_OWNER = "MOESYS_CHAOS_RUN"
"""In the environment of every process of the job: how those that it leaves are found."""
_LOOK_S = 0.01
_SETTLE_S = 2.0
"""For what a job leaves to end by itself."""
_CHECKPOINT_FOLDER = "checkpoints"
_DISK_KINDS = {"disk_full", "read_only"}
_SPARE_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to run: as `moesys train --nproc N OVERRIDES`, with restarts in place."""

    nproc: int
    overrides: Sequence[str]
    config_dir: Path | None = None
    max_restarts: int
    stall_s: float
    """Nothing new for so long: the job is stopped with SIGKILL, and has not survived."""

    def words(self, run_dir: Path, faults: Sequence[Fault] = ()) -> list[str]:
        """The command line of a job in `run_dir` that records every step. If some of `faults` kill torchrun it is that of
        launch/run.sh, which starts it again so often."""
        if relaunches := sum(fault.kind == "agent" for fault in faults):
            # What it takes from the environment is said here, so that the line does the same by hand.
            words = ["env", f"PYTHON={sys.executable}", f"PET_MAX_RESTARTS={self.max_restarts}"]
            words += [str(launch_folder() / "run.sh"), "--nproc", str(self.nproc)]
            words += ["--relaunch", str(relaunches)]
        else:
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            words += [f"--nproc-per-node={self.nproc}", f"--max-restarts={self.max_restarts}"]
            words += ["-m", "moesys.train"]
        if self.config_dir is not None:
            words += ["--config-dir", str(self.config_dir)]
        return [*words, *self.overrides, f"run.dir={run_dir}", "train.log_every_steps=1"]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A job that was watched to its end."""

    run_dir: Path
    outcomes: list[Outcome]
    losses: dict[int, float]
    """By step."""
    exit_code: int
    """Of the last launcher."""
    launches: int
    wall_s: float
    goodput_pct: float
    leaks: Leaks
    grown: Sample | None
    """The largest growth of any launcher or rank over its life; None if none lived long enough to say."""


def run_job(
    command: Command,
    run_dir: Path,
    faults: Sequence[Fault] = (),
    *,
    checkpoint_bytes: int = 0,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Watched:
    """Run it until it is done, started again after each launcher that ends otherwise, at most once for each fault.

    The output is kept in RUN/chaos/output.log. For faults of disks the checkpoint folder is a tmpfs for as long as
    the job runs, with room for three checkpoints of `checkpoint_bytes` more than it keeps; where that cannot
    be mounted `disk_full` is a quota. What it leaves behind is counted, and killed.

    Raises:
        ValueError: `run_dir` is not new; or `read_only` is wanted and no file system can be mounted.
    """
    if run_dir.exists():
        raise ValueError(f"{run_dir} is there already: remove it, or choose another run.dir")
    (run_dir / MARKERS).mkdir(parents=True)
    checkpoints = run_dir / _CHECKPOINT_FOLDER
    is_mounted = False
    if kinds := _DISK_KINDS & {fault.kind for fault in faults}:
        size_bytes = 8 * checkpoint_bytes + _SPARE_BYTES
        refused = disk.mount_small(checkpoints, size_bytes)
        if refused is not None and "read_only" in kinds:
            raise ValueError(
                f"read_only needs a file system of its own at {checkpoints}: {refused}. Run as root, or leave "
                "that kind out"
            )
        is_mounted = refused is None
    try:
        return _run(command, run_dir, faults, on_event)
    finally:
        if is_mounted:
            disk.unmount(checkpoints)


def _run(
    command: Command, run_dir: Path, faults: Sequence[Fault], on_event: Callable[[Event], None]
) -> Watched:
    shared_before = processes.shared_memory()
    owner = str(run_dir.resolve())
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        _OWNER: owner,
    }
    environment.pop(VARIABLE, None)
    if faults:
        environment[VARIABLE] = format_faults(faults)
    eye = Eye(run_dir, len(faults))
    began_s = time.monotonic()
    exit_code, launches = -1, 0
    left: list[int] = []
    try:
        with (run_dir / MARKERS / "output.log").open("w", encoding="utf-8") as log:
            while exit_code != DONE_EXIT_CODE and launches <= len(faults):
                launches += 1
                launcher = subprocess.Popen(
                    command.words(run_dir, faults),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
                assert launcher.stdout is not None
                eye.follow(launcher.pid, launcher.stdout, log)
                _watch(launcher, eye, command.stall_s, owner, on_event)
                exit_code = launcher.returncode
                # Ranks that outlive their launcher would hold the run folder.
                left = _left(owner)
                processes.kill(left)
                eye.end(exit_code)
    finally:
        wall_s = time.monotonic() - began_s
        processes.kill(processes.with_variable(_OWNER, owner))
    found_leaks = processes.leaks(left, shared_before)
    grown = [found for samples in eye.samples.values() if (found := growth(samples)) is not None]
    records = run_dir / FILE_NAME
    return Watched(
        run_dir=run_dir,
        outcomes=outcomes(faults, eye.events),
        losses=dict(eye.losses),
        exit_code=exit_code,
        launches=launches,
        wall_s=wall_s,
        goodput_pct=ledger_of(read_records(records)).goodput_pct if records.exists() else 0.0,
        leaks=found_leaks,
        grown=None
        if not grown
        else Sample(
            num_descriptors=max(found.num_descriptors for found in grown),
            memory_bytes=max(found.memory_bytes for found in grown),
        ),
    )


def _watch(
    launcher: subprocess.Popen[str],
    eye: Eye,
    stall_s: float,
    owner: str,
    on_event: Callable[[Event], None],
) -> None:
    """Until the launcher ends, or nothing happens any more."""
    num_told, news_s = len(eye.events), time.monotonic()
    while launcher.poll() is None:
        eye.look()
        now_s = time.monotonic()
        for event in eye.events[num_told:]:
            on_event(event)
            news_s = now_s
        num_told = len(eye.events)
        if now_s - news_s > stall_s:
            processes.kill(processes.with_variable(_OWNER, owner))
        time.sleep(_LOOK_S)


def _left(owner: str) -> list[int]:
    """Processes of the job that do not end by themselves."""
    until_s = time.monotonic() + _SETTLE_S
    while (left := processes.with_variable(_OWNER, owner)) and time.monotonic() < until_s:
        time.sleep(0.05)
    return left
