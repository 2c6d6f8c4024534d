"""A job with faults beside the same job without them, and what must hold of it."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from moesys.chaos.faults import parse_faults
from moesys.chaos.inject import MARKERS
from moesys.chaos.job import Command, Watched, run_job
from moesys.chaos.outcome import Event
from moesys.checkpoint.folder import step_folders
from moesys.checkpoint.verify import verify
from tests.train.launched import STEPS, overrides, records

SLOWNESS = float(os.environ.get("MOESYS_TEST_SLOWNESS", "1"))
"""Of this machine, busy with other things; the bounds on times are multiplied by it."""
KILL_FOUND_S, KILL_BACK_S = 1.0, 20.0
HANG_FOUND_S, HANG_BACK_S = 30.0, 60.0
_OURS = ("run.dir=", "train.log_every_steps=")


def command(data: Path, *more: str, nproc: int = 2, max_restarts: int = 2) -> Command:
    words = overrides(Path("unused"), data, "parallel.ep=2", *more)
    return Command(
        nproc=nproc,
        overrides=[word for word in words if not word.startswith(_OURS)],
        max_restarts=max_restarts,
        stall_s=180.0 * SLOWNESS,
    )


def undisturbed(job: Command, folder: Path) -> Watched:
    """The job without faults."""
    plain = run_job(job, folder)
    assert plain.exit_code == 0, where(plain)
    return plain


def disturbed(
    job: Command,
    folder: Path,
    faults: str,
    *,
    checkpoint_bytes: int = 0,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Watched:
    """The job with `faults`, which all happened and which it survived by itself, leaving nothing behind."""
    watched = run_job(
        job, folder, parse_faults(faults), checkpoint_bytes=checkpoint_bytes, on_event=on_event
    )
    said = where(watched)
    assert watched.exit_code == 0, said
    assert watched.launches == 1, said
    assert [outcome.survived for outcome in watched.outcomes] == [True] * len(watched.outcomes), (
        watched.outcomes
    )
    # Of /dev/shm only what no other program of this machine makes meanwhile could be told.
    assert (watched.leaks.processes, watched.leaks.ports) == (0, 0), said
    # Neither twice nor left out, whatever a restart undid.
    steps = [record["step"] for record in records(folder, "train")]
    assert steps == sorted(set(steps))
    return watched


def assert_exact(watched: Watched, plain: Watched) -> None:
    """Every loss is the one without faults, bit by bit, in what was seen and in what is on the disk."""
    assert watched.losses == plain.losses
    losses = [[r["loss"] for r in records(run.run_dir, "train")] for run in (watched, plain)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == len(plain.losses) >= STEPS


def assert_restarted(watched: Watched, *from_steps: Sequence[int]) -> None:
    """For each fault once, from one of its `from_steps`; every checkpoint that is there is whole."""
    starts = [record["resumed_from_step"] for record in records(watched.run_dir, "start")]
    assert len(starts) == 1 + len(from_steps), where(watched)
    assert starts[0] == 0
    for start, possible in zip(starts[1:], from_steps, strict=True):
        assert start in possible, where(watched)
    folders = step_folders(watched.run_dir / "checkpoints")
    assert folders
    assert [verify(folder) for folder in folders] == [[]] * len(folders)


def assert_in_time(watched: Watched, *, found_s: float, back_s: float) -> None:
    for outcome in watched.outcomes:
        assert outcome.found_s is not None, where(watched)
        assert outcome.back_s is not None, where(watched)
        assert outcome.found_s <= found_s * SLOWNESS, outcome
        assert outcome.back_s <= back_s * SLOWNESS, outcome


def step_of(watched: Watched, ordinal: int = 0) -> int:
    """In which the fault happened."""
    marker = watched.run_dir / MARKERS / f"{ordinal:04d}.json"
    return json.loads(marker.read_text())["step"]


def named(watched: Watched, pattern: str) -> int:
    """The step, group 1, of the first line of the output that `pattern` fits."""
    found = re.search(pattern, output(watched), re.MULTILINE)
    assert found is not None, f"{pattern}: {where(watched)}"
    return int(found[1])


def output(watched: Watched) -> str:
    return (watched.run_dir / MARKERS / "output.log").read_text()


def where(watched: Watched) -> str:
    """For a person whose test failed: the output is long."""
    return f"see {watched.run_dir / MARKERS / 'output.log'}"
