"""What has become of a run: RUN/status.json, one small file that each change replaces.

    queued -> running -> done                          (a run without Slurm begins with running)
                      -> requeued -> running           waits to go on: saved on request, or a rank was lost
                      -> failed -> oom, timeout        the scheduler later knows a better reason
                                -> requeued            the batch script starts the ranks again
    failed, oom, timeout, done -> queued, running      started again

`next_state` is that table, pure. Rank 0 of the job writes running, done, failed and requeued; the batch
script adds what rank 0 could not live to say, as

    python -m moesys.launch.status RUN failed --reason "exit code 137"

Standard library only: a batch script may run this with any Python.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

FILE_NAME = "status.json"
State = Literal["queued", "running", "requeued", "failed", "oom", "timeout", "done"]
STATES: tuple[State, ...] = get_args(State)

_START: tuple[State, ...] = ("queued", "running")
_FOLLOWERS: dict[State | None, tuple[State, ...]] = {
    None: STATES,
    "queued": ("queued", "running", "failed", "oom", "timeout"),
    "running": ("running", "requeued", "failed", "oom", "timeout", "done"),
    "requeued": ("queued", "running", "failed", "oom", "timeout"),
    "failed": ("requeued", "oom", "timeout", *_START),
    "oom": _START,
    "timeout": _START,
    "done": _START,
}


@dataclass(frozen=True, kw_only=True)
class Status:
    """One word about a run, and since when it holds."""

    state: State
    since_unix_s: float
    """When the run came into this state."""
    job_id: str | None = None
    """Of the scheduler, as in 17 or, of an array, 17_3; None for a run without one."""
    attempt: int = 0
    """How often the run has come to run, this time included; 0 = not yet."""
    reason: str = ""
    """Why it ended or waits; empty where the state says it all."""


def next_state(
    before: Status | None,
    state: State,
    *,
    now_unix_s: float,
    job_id: str | None = None,
    reason: str = "",
) -> Status:
    """The status after someone says `state`. What cannot follow is not believed: `before` is returned.

    So the first to say how an attempt ended is right, but for what a scheduler knows better (a failure
    that was a lack of memory or of time, or is not the end). Each `running` is an attempt. Without `job_id` the last one stays.
    """
    job_id = job_id if job_id is not None else before.job_id if before else None
    if before is None:
        attempt = 1 if state == "running" else 0
        return Status(
            state=state, since_unix_s=now_unix_s, job_id=job_id, attempt=attempt, reason=reason
        )
    if state not in _FOLLOWERS[before.state]:
        return before
    return Status(
        state=state,
        since_unix_s=now_unix_s,
        job_id=job_id,
        attempt=before.attempt + (state == "running"),
        reason=reason,
    )


def write_status(
    folder: str | Path, state: State, *, job_id: str | None = None, reason: str = ""
) -> Status:
    """Say that the run in `folder` is now in `state`; returns what the file says then.

    Written beside and renamed, so that no reader finds half a file. One writer at a time is assumed: a run
    that waits has no ranks yet, and a batch script speaks when they have ended.
    """
    folder = Path(folder)
    before = read_status(folder)
    after = next_state(before, state, now_unix_s=time.time(), job_id=job_id, reason=reason)
    if after is not before:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{FILE_NAME}.{os.getpid()}"
        beside.write_text(json.dumps(asdict(after)) + "\n", encoding="utf-8")
        os.replace(beside, folder / FILE_NAME)
    return after


def read_status(folder: str | Path) -> Status | None:
    """None where no status was ever written. ValueError naming a file that is not one of ours."""
    path = Path(folder) / FILE_NAME
    try:
        status = Status(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not the status of a run ({error}): remove the file, the run is not hurt by it"
        ) from error
    if status.state not in STATES:
        raise ValueError(
            f"{path} says state={status.state!r}, which must be one of {', '.join(STATES)}: remove the "
            "file, the run is not hurt by it"
        )
    return status


def job_id_of(environ: Mapping[str, str]) -> str | None:
    """The job's id in Slurm's environment; that of a task of an array names the task alone."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of batch scripts: folder, state and --reason."""
    parser = argparse.ArgumentParser(
        prog="python -m moesys.launch.status", description="Write RUN/status.json."
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path)
    parser.add_argument("state", choices=STATES)
    parser.add_argument("--reason", default="")
    parser.add_argument("--job-id", help="default: that of the environment")
    args = parser.parse_args(arguments)
    try:
        job_id = args.job_id or job_id_of(os.environ)
        write_status(args.run_folder, args.state, job_id=job_id, reason=args.reason)
    except (ValueError, OSError) as error:
        print(f"moesys.launch.status: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
