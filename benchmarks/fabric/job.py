"""Runs one command as every rank of a fabric, with torchrun's variables and a host name per node."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from benchmarks.fabric import cores
from benchmarks.fabric.layout import INTERFACE, Layout

STORE_PORT = 29_500
"""Of rank 0, where ranks meet."""
_LOOK_S = 0.5
"""Between looks for threads that carry bytes."""
_GRACE_S = 10.0
"""From SIGTERM to SIGKILL."""


def rank_variables(layout: Layout, rank: int, store_port: int = STORE_PORT) -> dict[str, str]:
    """What torchrun would set, and the interface that collectives are to use."""
    per_node = layout.ranks_per_node
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(layout.world_size),
        "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_RANK": str(layout.node_of(rank)),
        "GROUP_WORLD_SIZE": str(layout.num_nodes),
        "MASTER_ADDR": layout.address(0),
        "MASTER_PORT": str(store_port),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
    }


def run_job(
    layout: Layout,
    command: Sequence[str],
    *,
    environ: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    say: Callable[[int, str], None] | None = None,
    store_port: int = STORE_PORT,
) -> int:
    """Run `command` as every rank; return 0, or the status of the first that failed (124: it took too long).

    Where one fails the others are ended. `say(rank, line)` gets their output; None = this process's own, with the rank
    before each line. `environ` is this process's unless given.
    """
    inherited = dict(os.environ if environ is None else environ)
    inherited.setdefault("OMP_NUM_THREADS", "1")
    lock = threading.Lock()

    def tell(rank: int, line: str) -> None:
        with lock:
            if say is not None:
                say(rank, line)
            else:
                sys.stdout.write(f"[{rank}] {line}\n")
                sys.stdout.flush()

    ranks: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for rank in range(layout.world_size):
            variables = rank_variables(layout, rank, store_port)
            ranks.append(_start(layout, rank, command, {**inherited, **variables}))
            readers.append(threading.Thread(target=_read, args=(rank, ranks[-1].stdout, tell)))
            readers[-1].start()
        return _watch(layout, ranks, timeout_s)
    finally:
        _end(ranks)
        for reader in readers:
            reader.join()


def _start(
    layout: Layout, rank: int, command: Sequence[str], environ: Mapping[str, str]
) -> "subprocess.Popen[str]":
    name = f"node{layout.node_of(rank)}"
    as_node = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, *command]
    return subprocess.Popen(
        [*cores.entrance(layout, rank), "ip", "netns", "exec", layout.rank(rank), *as_node],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _read(rank: int, output: IO[str] | None, tell: Callable[[int, str], None]) -> None:
    assert output is not None
    for line in output:
        tell(rank, line.rstrip("\n"))


def _watch(
    layout: Layout, ranks: Sequence["subprocess.Popen[str]"], timeout_s: float | None
) -> int:
    deadline = time.monotonic() + (timeout_s if timeout_s is not None else float("inf"))
    look = time.monotonic()
    while True:
        if time.monotonic() >= look:
            look = time.monotonic() + _LOOK_S
            cores.free_carriers(layout)
        statuses = [process.poll() for process in ranks]
        failed = [status for status in statuses if status]
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if None not in statuses:
            return 0
        if time.monotonic() > deadline:
            return 124
        time.sleep(0.02)


def _end(ranks: Sequence["subprocess.Popen[str]"]) -> None:
    """With all that they started."""
    for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        running = [process for process in ranks if process.poll() is None]
        for process in running:
            os.killpg(process.pid, number)
        deadline = time.monotonic() + patience_s
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
