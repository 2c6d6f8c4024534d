"""A small checkpoint: written to the folder of the runs, read back, compared, and found damaged when it is."""

import tempfile
import time
from pathlib import Path

import torch

from moesys.checkpoint import errors, store
from moesys.checkpoint.save import save
from moesys.doctor.finding import Finding, Where, fail, ok

SIDE = 256
"""Of the one matrix in it: 256 KiB."""


def judge_checkpoint(error: str, is_equal: bool, is_damage_found: bool, seconds: float) -> Finding:
    """`error`: why it could not be written or read, "" if it could."""
    if error:
        return fail(
            "checkpoint",
            error.splitlines()[0],
            "set run.dir to a folder on a disk that can be written and renamed in",
        )
    if not is_equal or not is_damage_found:
        return fail(
            "checkpoint",
            "what was read is not what was written"
            if not is_equal
            else "a flipped bit was not found",
            "memory or disk of this machine change data: exclude the node, test its memory",
        )
    return ok("checkpoint", f"written, read, verified, a flipped bit found, in {seconds:.2f} s")


def checkpoint(where: Where) -> list[Finding]:
    start_s = time.monotonic()
    error, is_equal, is_damage_found = "", False, False
    try:
        with tempfile.TemporaryDirectory(dir=where.run_dir, prefix=".moesys_doctor_") as folder:
            is_equal, is_damage_found = _round_trip(Path(folder))
    except (errors.CheckpointError, OSError) as raised:
        error = str(raised)
    return [judge_checkpoint(error, is_equal, is_damage_found, time.monotonic() - start_s)]


def _round_trip(folder: Path) -> tuple[bool, bool]:
    written = torch.arange(SIDE * SIDE, dtype=torch.float32).view(SIDE, SIDE)
    path = save(folder, 1, {"matrix": written}, {"step": 1}, keep_last=1).path
    read = torch.zeros_like(written)
    loaded = store.load(path, {"matrix": read})
    is_equal = torch.equal(read, written) and loaded.state == {"step": 1}
    shard = max(path.iterdir(), key=lambda file: file.stat().st_size)
    with shard.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    try:
        store.load(path, {"matrix": read})
    except errors.CheckpointError:
        return is_equal, True
    return is_equal, False
