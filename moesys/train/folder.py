"""The run folder: one job at a time writes in it, and its files are never half-written."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """Written beside and renamed."""
    beside = path.with_suffix(path.suffix + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
