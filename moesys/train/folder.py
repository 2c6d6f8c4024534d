"""The run folder: one job at a time writes in it, and its files are never half-written."""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moesys.checkpoint.folder import free_bytes


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it when the process ends, however it ends.

    Raises ValueError naming the process that has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run.dir={folder} is in use by another job ({file.read().strip() or 'unknown'}): wait for it, "
                "stop it, or choose another run.dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_text(path: Path, text: str) -> None:
    """Written beside and renamed. Raises OSError; then nothing of it is left."""
    beside = path.with_suffix(path.suffix + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


@contextmanager
def may_fail(path: Path, fix: str) -> Iterator[None]:
    """Around the writing of a file that a run can do without: a disk that refuses it is told, with the `fix`."""
    try:
        yield
    except OSError as error:
        with suppress(OSError):  # the console may be a file on the same disk
            print(f"warning: {_refused(path, error)}; {fix}", file=sys.stderr, flush=True)


@contextmanager
def must_begin(folder: Path) -> Iterator[None]:
    """Around what a start writes in its run folder. Raises ValueError, with the fix, where a disk refuses it."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{_refused(folder, error)}: free space there, or choose another run.dir"
        ) from error


def _refused(path: Path, error: OSError) -> str:
    where = path if path.is_dir() else path.parent
    return f"{path} cannot be written ({error}; {free_bytes(where):,} bytes are free)"
