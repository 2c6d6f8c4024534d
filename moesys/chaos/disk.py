"""Disks that are full or read-only, for real: a small tmpfs in the place of a checkpoint folder, or a quota.

What undoes a fault is a process of its own, because the rank may not live to do it.
"""

import os
import resource
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

_FILLER = ".chaos-filler"
_QUOTA_ROOM_BYTES = 1 << 16
"""Above the largest file that a rank has already: records still fit, a shard does not."""
_REMOUNT_S = 5.0
"""Until no rank has a file open for writing, in which case the kernel refuses."""


def mount_small(folder: Path, size_bytes: int) -> str | None:
    """Put an empty tmpfs of `size_bytes` at `folder`; return why it cannot be, None if it was done."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "moesys-chaos", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    return None if done.returncode == 0 else done.stderr.strip() or f"mount: {done.returncode}"


def unmount(folder: Path) -> None:
    """Take it away again, also while a process has a file open there. What was in it is gone."""
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def is_small_mount(folder: Path) -> bool:
    return folder.is_dir() and os.path.ismount(folder)


def fill(folder: Path, seconds: float) -> str:
    """Leave no byte free on the small file system at `folder` for `seconds`; say what was done."""
    assert is_small_mount(folder), folder
    filler = folder / _FILLER
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
    size_bytes = 0
    try:
        with suppress(OSError):  # full, which is what was wanted
            while True:
                size_bytes += os.write(descriptor, bytes(4096))
    finally:
        os.close(descriptor)
    _later(seconds, "rm", "-f", str(filler))
    return f"{folder} is full, {size_bytes:,} bytes of it ours"


def make_read_only(folder: Path, seconds: float) -> str:
    """Remount the small file system at `folder` read-only for `seconds`; say what was done."""
    assert is_small_mount(folder), folder
    until_s = time.monotonic() + _REMOUNT_S
    while True:
        command = ["mount", "-o", "remount,ro", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            _later(seconds, "mount", "-o", "remount,rw", str(folder))
            return f"{folder} is read-only"
        if time.monotonic() > until_s:
            raise RuntimeError(f"chaos cannot make {folder} read-only: {done.stderr.strip()}")
        time.sleep(0.01)


def set_quota(run_dir: Path, seconds: float) -> str:
    """Let no file of this process grow much beyond the largest it has, for `seconds`; say what was done.

    The kernel's limit on file sizes, which a user's quota resembles: a write beyond it fails with EFBIG.
    """
    sizes = [path.stat().st_size for path in run_dir.iterdir() if path.is_file()]
    sizes += [os.fstat(descriptor).st_size for descriptor in (1, 2)]
    limit_bytes = max(sizes) + _QUOTA_ROOM_BYTES
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, former[1]))
    timer = threading.Timer(seconds, resource.setrlimit, (resource.RLIMIT_FSIZE, former))
    timer.daemon = True
    timer.start()
    return f"files of this rank may have {limit_bytes:,} bytes"


def _later(seconds: float, *command: str) -> None:
    """Run `command` after `seconds`, whatever becomes of this process."""
    subprocess.Popen(
        ["/bin/sh", "-c", 'sleep "$0"; exec "$@"', str(seconds), *command],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.environ.get("PATH", os.defpath)},
    )


def wake_later(process: int, seconds: float) -> None:
    """SIGCONT to `process` after `seconds`: it cannot wake itself."""
    _later(seconds, "kill", "-CONT", str(process))
