"""The runs of a folder: where each one stands, from its own files and, where there is one, its scheduler."""

import fcntl
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moesys.launch import slurm
from moesys.launch.status import FILE_NAME, Status, read_status, write_status
from moesys.report.records import parse_line, without_experts

_METRICS = "metrics.jsonl"
_TAIL_BYTES = 1 << 20
_OWNER = re.compile(r"process (?P<pid>\d+) on (?P<host>\S+)")
ENDED = ("done", "failed", "oom", "timeout")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come; None where it has not said yet."""

    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    folder: Path
    status: Status | None
    """None: it has records and never said how it is."""
    progress: Progress


def find_runs(root: Path) -> Iterator[Path]:
    """Folders below `root`, and `root` itself, that hold a status or records; what lies in one is not searched."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        if FILE_NAME in files or _METRICS in files:
            folders.clear()
            yield Path(folder)
        # A sweep's snapshot.
        elif "code" in folders:
            folders.remove("code")


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Every run, its status brought up to date first. Raises ValueError for a file that is not one of ours."""
    update_statuses(folders)
    return [
        Run(folder=folder, status=read_status(folder), progress=read_progress(folder))
        for folder in folders
    ]


def update_statuses(folders: Sequence[Path]) -> None:
    """Write down what became of runs that could not say so: the scheduler knows, or the process is gone."""
    statuses = {folder: status for folder in folders if (status := read_status(folder))}
    known = slurm.states([s.job_id for s in statuses.values() if s.job_id and s.state != "done"])
    for folder, status in statuses.items():
        if status.job_id:
            told = slurm.news(status, known.get(status.job_id))
        else:
            told = _news_of_process(folder, status)
        if told is not None:
            # Someone else's folder may be read-only, and is shown as it is.
            with suppress(OSError):
                write_status(folder, told[0], reason=told[1])


def _news_of_process(folder: Path, status: Status) -> tuple[Any, str] | None:
    """Of a run without a scheduler, on this machine."""
    owner = local_owner(folder)
    if status.state != "running" or owner is None or Path(f"/proc/{owner}").exists():
        return None
    return "failed", f"process {owner} is gone without a word"


def local_owner(folder: Path) -> int | None:
    """The process that has, or last had, the folder; None if it was on another machine, or there was none."""
    try:
        found = _OWNER.match((folder / ".lock").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found["pid"]) if found and found["host"] == socket.gethostname() else None


def is_held(folder: Path) -> bool:
    """Whether a process of this machine has the folder's lock: that of `local_owner`, not one with its number."""
    with (folder / ".lock").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_progress(folder: Path) -> Progress:
    """From the last training record; config.yaml says how many steps there are to be."""
    record = last_record(folder, "train") or {}
    return Progress(
        step=record.get("step"),
        steps=_steps(folder),
        loss=record.get("loss"),
        tokens_per_s=record.get("tokens_per_s"),
    )


def last_record(folder: Path, kind: str) -> dict[str, Any] | None:
    """The last record of this kind in the last megabyte of metrics.jsonl."""
    path = folder / _METRICS
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    # The first line may be half of one.
    for number, line in reversed(list(enumerate(lines, start=1))[1 if start else 0 :]):
        record = parse_line(without_experts(line), path=path, number=number)
        if record is not None and record["kind"] == kind:
            return record
    return None


def _steps(folder: Path) -> int | None:
    try:
        return int(yaml.safe_load((folder / "config.yaml").read_bytes())["train"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def newest_log(folder: Path) -> Path | None:
    """What the ranks of the last job printed; None for a run without a batch script."""
    logs = sorted(folder.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
    return logs[-1] if logs else None


def can_start(status: Status | None) -> bool:
    """Whether nothing has, or waits for, the folder. A job whose ranks have failed may start them again until it ends."""
    if status is None or status.state == "done":
        return True
    return status.state in ENDED and not (status.job_id and slurm.is_alive(status.job_id))


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A batch script and the runs that it makes."""

    script: Path
    runs: tuple[Path, ...]
    tasks: tuple[int, ...] | None = None
    """Of an array, the task of each run; None = the job is the one run."""


def submission_of(folder: Path) -> Submission:
    """To submit a run again; of a sweep, its task alone. Raises ValueError for a run that was not launched."""
    folder = folder.absolute()
    if (folder / "job.sbatch").is_file():
        return Submission(script=folder / "job.sbatch", runs=(folder,))
    for runs in folder.parent.glob("*.sweep/runs.txt"):
        lines = runs.read_text(encoding="utf-8").splitlines()
        if str(folder) in lines:
            tasks = (lines.index(str(folder)),)
            return Submission(script=runs.parent / "job.sbatch", runs=(folder,), tasks=tasks)
    raise ValueError(
        f"{folder} has no job.sbatch: it was not started by moesys launch; start it as it was started before"
    )


def submit(submission: Submission) -> str:
    """Queue the runs, and say so in each one's status before it can run; the job's id. Raises SlurmError.

    Nodes that a preflight found bad stay out, until RUN/exclude is removed.
    """
    tasks = submission.tasks
    options = [] if tasks is None else [f"--array={','.join(map(str, tasks))}"]
    excluded = {
        (folder / "exclude").read_text().strip()
        for folder in submission.runs
        if (folder / "exclude").is_file()
    }
    if excluded:
        options.append(f"--exclude={','.join(sorted(excluded))}")
    job_id = slurm.submit_held(submission.script, *options)
    for number, folder in enumerate(submission.runs):
        write_status(
            folder, "queued", job_id=job_id if tasks is None else f"{job_id}_{tasks[number]}"
        )
    slurm.release(job_id)
    return job_id
