"""Cores, memory and limits of this machine, and of the control group that this process is in."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from moesys.doctor.finding import GIB, Finding, Where, fail, ok, warn

MIN_MEMORY_BYTES = 2 * GIB
MIN_SHARED_BYTES = GIB
MIN_OPEN_FILES, MIN_PROCESSES = 4096, 1024
CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60
"""Version 1 writes no limit as a number near 2**63."""


def judge_cores(usable: int, present: int, quota: float | None, omp: str | None) -> Finding:
    """`quota`: cores' worth of time that the control group allows, None = all; `omp`: OMP_NUM_THREADS."""
    threads = omp or "unset, moesys train divides the cores among ranks"
    detail = f"{usable} of {present} usable, OMP_NUM_THREADS {threads}"
    if quota is not None and quota < usable:
        return warn(
            "cores",
            f"{detail}, limited to the time of {quota:g} by the control group",
            f"set OMP_NUM_THREADS to {max(1, int(quota))} / ranks, or ask for whole cores",
        )
    if omp is not None and omp.isdecimal() and int(omp) > usable:
        return warn(
            "cores",
            detail,
            f"set OMP_NUM_THREADS to at most {usable} / ranks: threads take turns on a core",
        )
    return ok("cores", detail)


def judge_memory(available_bytes: int, total_bytes: int, limit_bytes: int | None) -> Finding:
    """`limit_bytes`: what the control group leaves to this process, None = no limit."""
    usable = available_bytes if limit_bytes is None else min(available_bytes, limit_bytes)
    detail = f"{usable / GIB:.1f} of {total_bytes / GIB:.1f} GiB available"
    if limit_bytes is not None and limit_bytes < available_bytes:
        detail += ", limited by the control group"
    if usable >= MIN_MEMORY_BYTES:
        return ok("memory", detail)
    if limit_bytes is not None and limit_bytes < MIN_MEMORY_BYTES:
        return warn(
            "memory",
            detail,
            "the quickstart needs about 2 GiB: ask for more (sbatch --mem=0 is all of a node)",
        )
    return warn("memory", detail, "the quickstart needs about 2 GiB: close other programs")


def judge_shared_memory(total_bytes: int | None, free_bytes: int, error: str = "") -> Finding:
    """Of /dev/shm; `total_bytes` None if it cannot be used, with the reason."""
    if total_bytes is None:
        return fail(
            "/dev/shm",
            f"not usable ({error})",
            "mount a tmpfs there: ranks of one machine exchange data through it",
        )
    detail = f"{free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free"
    if total_bytes < MIN_SHARED_BYTES:
        return warn("/dev/shm", detail, "start the container with --shm-size=8g or --ipc=host")
    if free_bytes < MIN_SHARED_BYTES / 4:
        return warn(
            "/dev/shm", detail, "remove what dead jobs left there: ls -l /dev/shm, then rm yours"
        )
    return ok("/dev/shm", detail)


def judge_open_files(soft: int, hard: int) -> Finding:
    """-1 = unlimited."""
    text = "unlimited" if soft < 0 else str(soft)
    if soft < 0 or soft >= MIN_OPEN_FILES:
        return ok("open files", text)
    if 0 <= hard < MIN_OPEN_FILES:
        return warn(
            "open files",
            f"{text}, at most {hard}",
            "raise nofile in /etc/security/limits.conf, or LimitNOFILE of slurmd's service: each rank "
            "opens sockets to all others",
        )
    return warn(
        "open files",
        text,
        "ulimit -n 65536 before the start: each rank opens sockets to all others",
    )


def judge_processes(soft: int) -> Finding:
    if soft < 0 or soft >= MIN_PROCESSES:
        return ok("processes", "unlimited" if soft < 0 else str(soft))
    return warn(
        "processes", str(soft), "ulimit -u 4096: each rank starts dozens of threads, which count"
    )


def judge_locked_memory(soft: int, has_rdma: bool) -> Finding:
    """Bytes, -1 = unlimited."""
    text = "unlimited" if soft < 0 else f"{soft / GIB:.3g} GiB"
    if not has_rdma:
        return ok("locked memory", f"{text} (no InfiniBand here that would need it)")
    if soft < 0:
        return ok("locked memory", text)
    return fail(
        "locked memory",
        text,
        "ulimit -l unlimited: InfiniBand locks its buffers. Under Slurm: LimitMEMLOCK=infinity in "
        "slurmd's service, PropagateResourceLimitsExcept=MEMLOCK in slurm.conf",
    )


def cores(where: Where) -> list[Finding]:
    usable = len(os.sched_getaffinity(0))
    omp = os.environ.get("OMP_NUM_THREADS")
    return [judge_cores(usable, os.cpu_count() or usable, _quota(), omp)]


def memory(where: Where) -> list[Finding]:
    entries = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(entries[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return [judge_memory(available, total, _left_bytes())]


def shared_memory(where: Where) -> list[Finding]:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return [judge_shared_memory(None, 0, str(error))]
    if not os.access("/dev/shm", os.W_OK):
        return [judge_shared_memory(None, 0, "it cannot be written")]
    return [judge_shared_memory(usage.total, usage.free)]


def limits(where: Where) -> list[Finding]:
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    infiniband = Path("/sys/class/infiniband")
    has_rdma = infiniband.is_dir() and any(infiniband.iterdir())
    return [
        judge_open_files(files, most_files),
        judge_processes(processes),
        judge_locked_memory(locked, has_rdma),
    ]


def group_folders(cgroup: str, controller: str, root: Path = CGROUPS) -> Iterator[Path]:
    """The folders of `controller` for the lines of /proc/self/cgroup, from this process's group up to the root.

    Any of them may limit. A container that sees only its own group has it at the root.
    """
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "unified" if (root / "unified").is_dir() else root
        elif controller in controllers.split(","):
            top = root / controller
        else:
            continue
        own = top / path.lstrip("/")
        yield own
        yield from (folder for folder in own.parents if folder.is_relative_to(top))


def _numbers(folder: Path, file: str) -> list[int]:
    """The numbers in a file; none if it is absent. "max" is -1."""
    try:
        words = (folder / file).read_text().split()
    except OSError:
        return []
    return [-1 if word == "max" else int(word) for word in words]


def _quota() -> float | None:
    quotas: list[float] = []
    for folder in group_folders(Path("/proc/self/cgroup").read_text(), "cpu"):
        pair = _numbers(folder, "cpu.max") or [
            *_numbers(folder, "cpu.cfs_quota_us"),
            *_numbers(folder, "cpu.cfs_period_us"),
        ]
        if len(pair) == 2 and pair[0] > 0:
            quotas.append(pair[0] / pair[1])
    return min(quotas, default=None)


def _left_bytes() -> int | None:
    left: list[int] = []
    for folder in group_folders(Path("/proc/self/cgroup").read_text(), "memory"):
        limit = _numbers(folder, "memory.max") or _numbers(folder, "memory.limit_in_bytes")
        used = _numbers(folder, "memory.current") or _numbers(folder, "memory.usage_in_bytes")
        if limit and used and 0 <= limit[0] < _UNLIMITED_BYTES:
            left.append(max(0, limit[0] - used[0] + _cached_bytes(folder)))
    return min(left, default=None)


def _cached_bytes(folder: Path) -> int:
    """Of files, which the kernel gives back when memory is asked for."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    entries = dict(line.split() for line in lines)
    return int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
