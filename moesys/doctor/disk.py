"""The folder that runs are written to: speed, space, files, quota."""

import errno
import os
import shutil
import tempfile
import time
from pathlib import Path

from moesys.doctor.command import output
from moesys.doctor.finding import GIB, Finding, Where, fail, ok, warn

MIN_WRITE_MB_PER_S = 50.0
MIN_FREE_BYTES = 5 * GIB
MIN_FREE_FILES = 10_000
BLOCK_BYTES = 2**20
NUM_BLOCKS, QUICK_NUM_BLOCKS = 64, 8


def judge_disk(
    folder: str, free_bytes: int, write_mb_per_s: float, read_mb_per_s: float, is_same: bool
) -> Finding:
    """`is_same`: what was read is what was written."""
    detail = (
        f"{folder}: {free_bytes / GIB:.1f} GiB free, "
        f"writes {write_mb_per_s:.0f} MB/s, reads {read_mb_per_s:.0f} MB/s"
    )
    if not is_same:
        return fail(
            "disk",
            f"{detail}; what was read is not what was written",
            "set run.dir to another disk and have this one, its cable and its memory looked at",
        )
    slow, full = write_mb_per_s < MIN_WRITE_MB_PER_S, free_bytes < MIN_FREE_BYTES
    if slow or full:
        advice = ["checkpoints need space: free some"] * full
        advice += ["checkpoints will be slow: set run.dir to another disk"] * slow
        return warn("disk", detail, "; ".join(advice))
    return ok("disk", detail)


def judge_disk_error(folder: str, code: int, needed_bytes: int, free_bytes: int) -> Finding:
    """The write failed with this errno."""
    reason = os.strerror(code)
    match code:
        case errno.ENOSPC:
            detail = f"{folder} is full: {needed_bytes:,} bytes needed, {free_bytes:,} free"
            return fail("disk", detail, "free space there, or set run.dir to another disk")
        case errno.EDQUOT:
            detail = (
                f"{folder} cannot be written ({reason}): {free_bytes:,} bytes are free, not for you"
            )
            return fail("disk", detail, "remove files of yours there, or ask for a larger quota")
        case errno.EROFS:
            detail = f"{folder} cannot be written ({reason})"
            fix = "a file system turns read-only after an error: see dmesg; set run.dir to another"
            return fail("disk", detail, fix)
        case _:
            detail = f"{folder} cannot be written ({reason})"
            return fail("disk", detail, "go to a folder that can, or set run.dir to one")


def judge_files(folder: str, free_files: int, all_files: int) -> Finding:
    """Inodes; `all_files` 0 = the file system does not count them."""
    if all_files == 0:
        return ok("inodes", f"{folder}: not limited")
    detail = f"{folder}: {free_files:,} of {all_files:,} free"
    if free_files == 0:
        return fail(
            "inodes", detail, "remove small files there: no file can be made, whatever the space"
        )
    if free_files < MIN_FREE_FILES:
        return warn("inodes", detail, "remove small files there: each checkpoint is one per rank")
    return ok("inodes", detail)


def judge_quota(report: str | None) -> Finding:
    """What `quota` or `lfs quota` printed, which mark what is over its limit with *; None without them."""
    if report is None:
        return ok("quota", "no quota is known here")
    over = [
        line.strip() for line in report.splitlines() if any(w.endswith("*") for w in line.split())
    ]
    if over:
        return warn(
            "quota",
            f"over its limit: {'; '.join(over)}",
            "remove files of yours, or ask for more: after the grace period no write succeeds",
        )
    return ok("quota", "within its limits")


def disk(where: Where) -> list[Finding]:
    """Writes, syncs and reads one file that no one else sees, and that is gone afterwards."""
    folder = str(where.run_dir)
    num_blocks = QUICK_NUM_BLOCKS if where.quick else NUM_BLOCKS
    block = os.urandom(BLOCK_BYTES)
    try:
        write_s, read_s, is_same = _timed(where.run_dir, block, num_blocks)
    except OSError as error:
        free = shutil.disk_usage(where.run_dir).free
        return [judge_disk_error(folder, error.errno or 0, num_blocks * BLOCK_BYTES, free)]
    megabytes = num_blocks * BLOCK_BYTES / 1e6
    free = shutil.disk_usage(where.run_dir).free
    return [judge_disk(folder, free, megabytes / write_s, megabytes / read_s, is_same)]


def files_and_quota(where: Where) -> list[Finding]:
    counts = os.statvfs(where.run_dir)
    report = output(["lfs", "quota", "-q", str(where.run_dir)]) or output(["quota", "-w", "-p"])
    return [
        judge_files(str(where.run_dir), counts.f_favail, counts.f_files),
        judge_quota(report or None),
    ]


def _timed(folder: Path, block: bytes, num_blocks: int) -> tuple[float, float, bool]:
    with tempfile.TemporaryFile(dir=folder, prefix=".moesys_doctor_", buffering=0) as file:
        start_s = time.perf_counter()
        for _ in range(num_blocks):
            written = file.write(block)
            if written != len(block):
                raise OSError(errno.ENOSPC, "a write was cut short")
        os.fsync(file.fileno())
        write_s = time.perf_counter() - start_s
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from memory
        file.seek(0)
        start_s = time.perf_counter()
        is_same = all(file.read(len(block)) == block for _ in range(num_blocks))
        return write_s, time.perf_counter() - start_s, is_same
