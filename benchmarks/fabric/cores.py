"""How much of a core each rank of a fabric computes with: a control group of Linux for each rank, with a quota.

On one machine ranks share its cores, so that one with more to do takes what others leave. With a quota each computes as fast as if it
had a slow machine of its own. Threads that carry gloo's bytes have none: adapters do that on real machines, also while a rank computes.
"""

import contextlib
import os
import time
from pathlib import Path

from benchmarks.fabric.layout import Layout

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 10_000
"""In which a rank's quota is spent: so long it may have to wait, at most."""
LEAST_US = 1000
"""That the kernel takes for a quota."""
CARRIERS = ("gloo_tcp_loop", "pt_gloo_runloop")
"""Names of threads, as the kernel has them."""


def why_not(root: Path = ROOT) -> str | None:
    """Why ranks can have no share of a core here; None if they can."""
    try:
        parent = _parent(root)
        parent.mkdir(exist_ok=True)
    except OSError as error:
        return f"{root} is no place to make a control group with a share of a core ({error}): leave --cores-per-rank out"
    return None


def make_groups(layout: Layout, root: Path = ROOT) -> None:
    """One for each rank, with its quota. Nothing where the layout has none."""
    if layout.cores_per_rank is None:
        return
    parent = _parent(root)
    parent.mkdir(exist_ok=True)
    if not _is_old(root):
        for folder in (root, parent):
            (folder / "cgroup.subtree_control").write_text("+cpu")
    quota_us = max(LEAST_US, round(PERIOD_US * layout.cores_per_rank))
    for rank in range(layout.world_size):
        group = parent / layout.rank(rank)
        group.mkdir(exist_ok=True)
        if _is_old(root):
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (group / "cgroup.type").write_text("threaded")
            (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")


def remove_groups(name: str, root: Path = ROOT, patience_s: float = 5.0) -> None:
    """Of a fabric whose processes have been ended. May be called at any time."""
    deadline = time.monotonic() + patience_s
    for group in _parent(root).glob(f"{name}-*"):
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                try:
                    group.rmdir()
                except OSError:  # a process is still on its way out
                    time.sleep(0.02)
                    continue
            break


def entrance(layout: Layout, rank: int, root: Path = ROOT) -> list[str]:
    """Words before a command, which then runs with the rank's share of a core."""
    if layout.cores_per_rank is None:
        return []
    parent = _parent(root)
    enter = 'echo $$ > "$0" && echo $$ > "$1" && shift && exec "$@"'
    members = [group / "cgroup.procs" for group in (parent, parent / layout.rank(rank))]
    return ["sh", "-c", enter, *map(os.fspath, members)]


def free_carriers(layout: Layout, root: Path = ROOT) -> None:
    """From their quota; those that ranks have started so far."""
    if layout.cores_per_rank is None:
        return
    parent, name = _parent(root), "tasks" if _is_old(root) else "cgroup.threads"
    for rank in range(layout.world_size):
        for thread in (parent / layout.rank(rank) / name).read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                if Path("/proc", thread, "comm").read_text().strip() in CARRIERS:
                    (parent / name).write_text(thread)


def _parent(root: Path) -> Path:
    return root / ("cpu/moesys-fabric" if _is_old(root) else "moesys-fabric")


def _is_old(root: Path) -> bool:
    """Version 1 has a tree for each kind of resource."""
    return (root / "cpu" / "cpu.shares").exists()
