"""Runs the points of a sweep one after the other, each as `moesys train` would; what is done is not done again."""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moesys.launch.status import read_status
from moesys.report.numbers import duration
from moesys.report.records import read_records
from moesys.sweep.points import Point
from moesys.sweep.table import Measured, measured
from moesys.train.metrics import FILE_NAME


def run_points(
    points: Sequence[Point],
    folder: Path,
    train_options: Sequence[str],
    say: Callable[[str], None],
) -> tuple[list[Measured], list[str]]:
    """What was measured, in order, and the names of those that failed; their output is in FOLDER/NAME.log."""
    folder.mkdir(parents=True, exist_ok=True)
    found, failed, seconds = [], [], []
    for number, point in enumerate(points, start=1):
        run_dir = folder / point.name
        if _is_done(run_dir):
            said = "done before"
        else:
            began_s = time.monotonic()
            command = command_of(point, run_dir, train_options)
            with (folder / f"{point.name}.log").open("w") as log:
                exit_code = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, check=False
                ).returncode
            seconds.append(time.monotonic() - began_s)
            left_s = (len(points) - number) * sum(seconds) / len(seconds)
            said = f"{duration(seconds[-1])}, about {duration(left_s)} left"
            if exit_code:
                failed.append(point.name)
                say(f"[{number}/{len(points)}] {point.name}: failed with {exit_code}: {log.name}")
                continue
        one = measured(point.row, point.name, read_records(run_dir / FILE_NAME))
        if one is None:
            failed.append(point.name)
            say(f"[{number}/{len(points)}] {point.name}: has no evaluation: set train.eval_tokens")
            continue
        found.append(one)
        say(f"[{number}/{len(points)}] {point.name}: validation loss {one.val_loss:.4f} ({said})")
    return found, failed


def command_of(point: Point, run_dir: Path, train_options: Sequence[str]) -> list[str]:
    """The words that run one point."""
    moesys = [sys.executable, "-m", "moesys", "train", *train_options]
    return [*moesys, *point.overrides, f"run.name={point.name!r}", f"run.dir={str(run_dir)!r}"]


def shown(point: Point, folder: Path, train_options: Sequence[str]) -> str:
    """The same for people."""
    words = command_of(point, folder / point.name, train_options)[3:]
    return shlex.join(["moesys", *words])


def _is_done(run_dir: Path) -> bool:
    status = read_status(run_dir) if run_dir.is_dir() else None
    return status is not None and status.state == "done"
