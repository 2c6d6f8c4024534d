"""`moesys runs`: where every run stands; follow one, stop it, submit it again."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesys.launch.runs import Run

_POLL_S = 0.5


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "runs",
        help="list runs, follow one, stop it, submit it again",
        description="Read RUN/status.json and RUN/metrics.jsonl, and ask Slurm, where there is one, what became "
        "of jobs that could not say so themselves.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="every run below a folder")
    listing.add_argument("--json", action="store_true", help="print one JSON list")
    listing.add_argument(
        "root",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        default=Path("runs"),
        help="default: runs",
    )

    tail = actions.add_parser("tail", help="show what a run prints until it ends")
    tail.add_argument(
        "--lines", metavar="N", type=int, default=20, help="to begin with; default 20"
    )
    tail.add_argument("--once", action="store_true", help="show the last lines and stop")

    cancel = actions.add_parser("cancel", help="let a run save, and end it for good")
    cancel.add_argument("--now", action="store_true", help="end it without waiting for a save")

    again = actions.add_parser("resubmit", help="queue a run again, to go on where it stopped")

    for action in (tail, cancel, again):
        action.add_argument(
            "run", metavar="RUN", help="its folder, or its name where that is runs/NAME"
        )


def run(args: argparse.Namespace) -> int:
    from moesys.launch.slurm import SlurmError

    try:
        return _ACTIONS[args.action](args)
    except SlurmError as error:
        raise ValueError(f"{error}") from error


def _list(args: argparse.Namespace) -> int:
    from moesys.launch.runs import find_runs, read_runs

    if not args.root.is_dir():
        raise ValueError(f"{args.root} is not a folder: name the one that holds your run folders")
    found = read_runs(list(find_runs(args.root)))
    rows = [_row(run, args.root) for run in found]
    print(json.dumps(rows, indent=1) if args.json else _table(rows, time.time()))
    return 0


def _row(run: "Run", root: Path) -> dict[str, Any]:
    status, progress = run.status, run.progress
    name = run.folder.relative_to(root).as_posix()
    return {
        "name": root.resolve().name if name == "." else name,
        "folder": str(run.folder),
        "state": status.state if status else None,
        "job_id": status.job_id if status else None,
        "attempt": status.attempt if status else None,
        "step": progress.step,
        "steps": progress.steps,
        "loss": progress.loss,
        "tokens_per_s": progress.tokens_per_s,
        "since_unix_s": status.since_unix_s if status else None,
        "reason": status.reason if status else "",
    }


def _table(rows: Sequence[dict[str, Any]], now_unix_s: float) -> str:
    head = ["name", "state", "job", "step", "loss", "tokens/s", "since", "why"]
    cells = [
        [
            row["name"],
            row["state"] or "?",
            row["job_id"] or "-",
            f"{_or_dash(row['step'])}/{_or_dash(row['steps'])}",
            "-" if row["loss"] is None else f"{row['loss']:.4f}",
            "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}",
            "-" if row["since_unix_s"] is None else age(now_unix_s - row["since_unix_s"]),
            row["reason"].partition("\n")[0][:60],
        ]
        for row in rows
    ]
    lines = [head, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def age(seconds: float) -> str:
    """Two units at most: "3 d 4 h", "5 min"."""
    left = max(0, int(seconds))
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)


def _folder(name: str) -> Path:
    """A run by its folder or its name. ValueError for one that is not there."""
    from moesys.launch.runs import find_runs

    for folder in (Path(name), Path("runs", name)):
        if folder.is_dir() and next(iter(find_runs(folder)), None) == folder:
            return folder
    raise ValueError(
        f"{name} is neither a run folder nor the name of one in runs/: moesys runs list FOLDER shows what there is"
    )


def _tail(args: argparse.Namespace) -> int:
    """The batch script's log, or, for a run without one, its records, a line for each."""
    from moesys.launch.runs import can_start, newest_log, update_statuses
    from moesys.launch.status import read_status

    folder = _folder(args.run)
    update_statuses([folder])
    path = newest_log(folder) or folder / "metrics.jsonl"
    at = _offset_of_last_lines(path, args.lines)
    while True:
        status = read_status(folder)
        newest = newest_log(folder) or path
        if newest != path:
            path, at = newest, 0
        at += _print_lines(path, at)
        if args.once or can_start(status):
            if status is not None:
                print(f"{folder}: {status.state}{status.reason and f', {status.reason}'}")
            return 0
        time.sleep(_POLL_S)


def _offset_of_last_lines(path: Path, lines: int) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        offsets = [0]
        for line in file:
            offsets.append(offsets[-1] + len(line))
    return offsets[max(0, len(offsets) - 1 - lines)]


def _print_lines(path: Path, at: int) -> int:
    """Print the whole lines from this offset on; how many bytes they are."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(at)
        text = file.read()
    text = text[: text.rfind(b"\n") + 1]
    for line in text.decode(errors="replace").splitlines():
        print(_short(line) if path.suffix == ".jsonl" else line)
    sys.stdout.flush()
    return len(text)


def _short(line: str) -> str:
    """The numbers of a record; what is long, as expert loads, is left out."""
    record = json.loads(line)
    words = [f"{k}={_number(v)}" for k, v in record.items() if isinstance(v, int | float | str)]
    return " ".join(words)


def _number(value: float | str) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _cancel(args: argparse.Namespace) -> int:
    import os
    import signal

    from moesys.launch import slurm
    from moesys.launch.runs import can_start, is_held, local_owner, update_statuses
    from moesys.launch.status import read_status, write_status

    folder = _folder(args.run)
    update_statuses([folder])
    status = read_status(folder)
    if status is None or can_start(status):
        raise ValueError(
            f"{folder} is {status.state if status else 'not known to run'}: nothing to cancel"
        )
    if status.job_id is None:
        owner = local_owner(folder)
        if owner is None or not is_held(folder):
            raise ValueError(
                f"{folder} is not held by a process of this machine: cancel it where it runs"
            )
        os.kill(owner, signal.SIGKILL if args.now else signal.SIGTERM)
        print(f"{folder}: process {owner} was told to {'end' if args.now else 'save and end'}")
    elif status.state == "running" and not args.now:
        slurm.stop_and_save(status.job_id)
        print(f"{folder}: job {status.job_id} saves and ends; moesys runs resubmit goes on")
    else:
        slurm.cancel(status.job_id)
        write_status(folder, "failed", reason="cancelled")
        print(f"{folder}: job {status.job_id} is cancelled")
    return 0


def _resubmit(args: argparse.Namespace) -> int:
    from moesys.launch.runs import can_start, submission_of, submit, update_statuses
    from moesys.launch.status import read_status

    folder = _folder(args.run)
    update_statuses([folder])
    status = read_status(folder)
    if status is not None and not can_start(status):
        raise ValueError(
            f"{folder} is {status.state} as job {status.job_id}: wait for it, or moesys runs cancel {args.run}"
        )
    job_id = submit(submission_of(folder))
    print(f"job {job_id}: moesys runs tail {args.run}")
    return 0


_ACTIONS = {"list": _list, "tail": _tail, "cancel": _cancel, "resubmit": _resubmit}
