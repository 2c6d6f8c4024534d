"""A process of this machine, known well enough to end it and no other.

A rank that is stopped (SIGSTOP, a debugger, a frozen container) holds its launcher for as long as that waits
before SIGKILL, 30 s for torchrun, and the restart with it.
"""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """Ids are used again, but not by a process that began at the same moment of the same run of a machine."""

    boot: str
    pid: int
    started_ticks: int


def own_process() -> ProcessId | None:
    """This process; None where the system does not tell (no /proc)."""
    return _look(os.getpid())


def is_stopped(process: ProcessId) -> bool:
    """Whether it is a process of this machine, and stopped."""
    return _look(process.pid) == process and _state(process.pid) in ("T", "t")


def end_if_stopped(process: ProcessId) -> bool:
    """SIGKILL, if `is_stopped`. Whether it was."""
    if not is_stopped(process):
        return False
    with suppress(OSError):  # not ours
        os.kill(process.pid, signal.SIGKILL)
        return True
    return False


def _look(pid: int) -> ProcessId | None:
    fields = _fields(pid)
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return ProcessId(boot=boot, pid=pid, started_ticks=int(fields[19])) if fields else None


def _state(pid: int) -> str:
    return (_fields(pid) or [""])[0]


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on: before it is a name that may hold anything (proc(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
