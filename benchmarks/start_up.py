"""How long a job takes from its submission to the end of its first step, and which part of that takes how long.

    launcher     from `moesys train` on the command line to rank 0's process: its checks, and torchrun's start
    import ...   of rank 0's process, as its start record splits it
    first_step   from the start record to the record of step 1

All are of rank 0, and sum to the total.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moesys.report.records import read_records
from moesys.train.metrics import FILE_NAME
from moesys.train.start_up import SUBMITTED_VARIABLE

PARTS = ("launcher", "import", "configuration", "rendezvous", "data", "model", "load", "measure")
_TIMEOUT_S = 600.0


def time_start(
    ranks: int, overrides: Sequence[str], run_dir: Path, log_path: Path
) -> dict[str, float]:
    """Seconds by part of one start of `moesys train --nproc RANKS` in a new folder, with `total` and `first_step`.

    Raises:
        ValueError: the job failed; names its output.
    """
    words = [sys.executable, "-m", "moesys", "train", "--nproc", str(ranks), *overrides]
    submitted_unix_s = time.time()
    with log_path.open("w") as log:
        done = subprocess.run(
            [*words, f"run.dir={run_dir}", "train.steps=1"],
            env=os.environ | {SUBMITTED_VARIABLE: repr(submitted_unix_s)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
        )
    if done.returncode != 0:
        raise ValueError(
            f"a job of {ranks} ranks ended with exit code {done.returncode}: see {log_path}"
        )
    return split(list(read_records(run_dir / FILE_NAME)))


def split(records: Sequence[Mapping]) -> dict[str, float]:
    """Of the first start among the records of a job that was told when it was submitted. Pure."""
    start = next(record for record in records if record["kind"] == "start")
    step = next(record for record in records if record["kind"] == "train")
    parts_s = dict(start["start_up_s"])
    parts_s["launcher"] = parts_s.pop("queue")
    total_s = step["unix_s"] - start["submitted_unix_s"]
    known_s = {part: parts_s[part] for part in PARTS}
    return {"total": total_s, **known_s, "first_step": total_s - sum(known_s.values())}


def measure_starts(
    worlds: Sequence[int],
    overrides_of: Callable[[int], Sequence[str]],
    folder: Path,
    repeats: int,
    progress: Callable[[str], None],
) -> list[dict[str, float]]:
    """A row for each number of ranks: the start of median length among `repeats`. Rounds over all numbers, in turn."""
    found: dict[int, list[dict[str, float]]] = {ranks: [] for ranks in worlds}
    folder.mkdir(parents=True, exist_ok=True)
    for repeat in range(repeats):
        for ranks in worlds:
            name = f"start-{ranks}-{repeat}"
            run_dir, log_path = folder / name, folder / f"{name}.log"
            found[ranks].append(time_start(ranks, overrides_of(ranks), run_dir, log_path))
            progress(
                f"start [{repeat + 1}/{repeats}] of {ranks} ranks: {found[ranks][-1]['total']:.1f} s"
            )
    return [
        {"ranks": ranks, **{f"{part}_s": s for part, s in _median(starts).items()}}
        for ranks, starts in found.items()
    ]


def _median(starts: Sequence[dict[str, float]]) -> dict[str, float]:
    """One that was measured, so that its parts sum to its total."""
    wanted = statistics.median_low(start["total"] for start in starts)
    return next(start for start in starts if start["total"] == wanted)
