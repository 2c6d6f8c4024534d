"""Generations: every start of a job in a run folder has a number, and only the newest may write there.

A lock is freed when the node that holds it is cut off, or never was one between nodes; the process goes on
once the network is back. So a start claims RUN/generations/NNNNNN, a file that only one can create, and asks
whether it is still the newest before it changes what the next start reads.

Asking is not enough: a process can be stopped between the answer and the change. What is changed is therefore
made beside and renamed, in this order,

    a start:   claim, clear what is unfinished, read
    a change:  begin a file or folder of its own, write, ask, rename

and a former generation cannot rename after the clear: what it began before is gone, what it begins later it
asks about after the claim. (Fencing tokens: Kleppmann, Designing Data-Intensive Applications, chapter 8.)
"""

import json
import os
import re
import secrets
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from moesys.checkpoint.errors import Superseded

_NUMBER = re.compile(r"\d{6,}")


class Generation:
    """A claimed number; made by `claim`."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        """RUN/generations."""
        self.number = number

    def check(self) -> None:
        """Is this the newest? Raises Superseded, naming both generations; thread-safe."""
        # To change a folder makes a network file system read it anew.
        probe = self.folder / f".asks-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
        newest = _newest(self.folder)
        if newest != self.number:
            raise Superseded(
                f"run.dir={self.folder.parent} has another writer: generation {newest} "
                f"({_said(self.folder, newest)}) has taken over from generation {self.number} "
                f"({_said(self.folder, self.number)}), which leaves and changes nothing. If it is the one to "
                "keep, stop the other and start it again"
            )


def claim(run_folder: Path, *, job_id: str | None = None) -> Generation:
    """The next number, with who has it: node, process, job and time. For rank 0, at its start."""
    folder = run_folder / "generations"
    folder.mkdir(parents=True, exist_ok=True)
    who = {
        "node": socket.gethostname(),
        "pid": os.getpid(),
        "job_id": job_id,
        "unix_s": time.time(),
    }
    while True:
        number = _newest(folder) + 1
        try:
            with _path(folder, number).open("x", encoding="utf-8") as file:
                file.write(json.dumps(who) + "\n")
        except FileExistsError:
            continue  # another start was faster
        return Generation(folder, number)


def _newest(folder: Path) -> int:
    return max((int(name) for name in os.listdir(folder) if _NUMBER.fullmatch(name)), default=0)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}"


def _said(folder: Path, number: int) -> str:
    """Who claimed it, as its file says; that of a process killed while it wrote says nothing."""
    try:
        who = json.loads(_path(folder, number).read_text(encoding="utf-8"))
        began = datetime.fromtimestamp(who["unix_s"], UTC).isoformat(timespec="seconds")
        job = f", job {who['job_id']}" if who["job_id"] else ""
        return f"process {who['pid']} on {who['node']}{job}, began {began}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
