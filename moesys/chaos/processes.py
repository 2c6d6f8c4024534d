"""Processes of this machine as /proc shows them (Linux), and what a job must not leave behind."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moesys.chaos.outcome import Sample

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LISTENING = "0A"
"""In /proc/net/tcp."""
SHARED_MEMORY = Path("/dev/shm")


def is_alive(process: int) -> bool:
    """Whether it still runs; one that has ended and was not collected does not."""
    return _state(process) not in (None, "Z", "X")


def descendants(process: int) -> list[int]:
    """Its children, theirs, and so on."""
    children: dict[int | None, list[int]] = {}
    for other in _all():
        children.setdefault(_parent(other), []).append(other)
    found, new = [], [process]
    while new:
        new = [child for parent in new for child in children.get(parent, ())]
        found += new
    return found


def with_variable(name: str, value: str) -> list[int]:
    """All that live with this in the environment that they were started with."""
    wanted = f"{name}={value}".encode()
    return [process for process in _all() if is_alive(process) and wanted in _environment(process)]


def variable(process: int, name: str) -> str | None:
    """Of the environment that it was started with; None if absent, or the process is gone."""
    prefix = f"{name}=".encode()
    found = (item for item in _environment(process) if item.startswith(prefix))
    item = next(found, None)
    return None if item is None else item[len(prefix) :].decode()


def sample(process: int) -> Sample | None:
    """Its open descriptors and resident memory; None once it is gone."""
    try:
        num_descriptors = len(os.listdir(f"/proc/{process}/fd"))
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return Sample(num_descriptors=num_descriptors, memory_bytes=pages * _PAGE_BYTES)


def kill(processes: Iterable[int]) -> None:
    """SIGKILL, which a stopped process hears too."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """What is left when a job has ended."""

    processes: int
    ports: int
    """That those listen on."""
    shared_memory: tuple[str, ...]
    """New entries of /dev/shm that no living process has open."""

    def __str__(self) -> str:
        return (
            f"{self.processes} processes, {self.ports} ports, "
            f"{len(self.shared_memory)} entries of {SHARED_MEMORY}"
        )

    @property
    def total(self) -> int:
        return self.processes + self.ports + len(self.shared_memory)


def shared_memory() -> set[str]:
    """The entries of /dev/shm now."""
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def leaks(left: Iterable[int], shared_before: set[str]) -> Leaks:
    """Of a job whose processes should all be gone but are `left`."""
    left = list(left)
    new = shared_memory() - shared_before
    held = {name for process in _all() for name in _held(process)} if new else set()
    return Leaks(
        processes=len(left),
        ports=len(_listening_inodes() & {inode for p in left for inode in _socket_inodes(p)}),
        shared_memory=tuple(sorted(new - held)),
    )


def _all() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _state(process: int) -> str | None:
    fields = _stat(process)
    return fields[0] if fields else None


def _parent(process: int) -> int | None:
    fields = _stat(process)
    return int(fields[1]) if fields else None


def _stat(process: int) -> list[str]:
    """Of /proc/PID/stat what follows the name, which may hold anything; empty if the process is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _environment(process: int) -> list[bytes]:
    try:
        return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _links(process: int) -> list[str]:
    """What its descriptors are."""
    found = []
    with suppress(OSError):
        for name in os.listdir(f"/proc/{process}/fd"):
            with suppress(OSError):
                found.append(os.readlink(f"/proc/{process}/fd/{name}"))
    return found


def _held(process: int) -> set[str]:
    """The entries of /dev/shm that it has open or mapped."""
    paths = _links(process)
    with suppress(OSError):
        maps = Path(f"/proc/{process}/maps").read_text(errors="replace")
        paths += [line.split(maxsplit=5)[-1] for line in maps.splitlines()]
    prefix = f"{SHARED_MEMORY}/"
    return {path[len(prefix) :].split("/")[0] for path in paths if path.startswith(prefix)}


def _socket_inodes(process: int) -> set[str]:
    return {link[8:-1] for link in _links(process) if link.startswith("socket:[")}


def _listening_inodes() -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING:
                    inodes.add(fields[9])
    return inodes
