"""What only several nodes together can look at, besides their links: clocks and the folder of the runs."""

import os
import secrets
import time
from pathlib import Path

import torch.distributed as dist

NUM_ASKS = 4
VISIBLE_WITHIN_S = 10.0
"""A network file system may show a new file only after its attribute cache has gone stale."""


def serve_time(store: dist.Store, ranks: list[int]) -> None:
    """Rank 0: answers each of `ranks` NUM_ASKS times, one rank after the other."""
    for rank in ranks:
        for ask in range(NUM_ASKS):
            store.get(f"ask {rank} {ask}")
            store.set(f"time {rank} {ask}", repr(time.time()))


def ask_time(store: dist.Store, rank: int) -> float:
    """Seconds that this clock is ahead of rank 0's: of the quickest answer, whose way there and back we halve."""
    found: list[tuple[float, float]] = []
    for ask in range(NUM_ASKS):
        before_s = time.time()
        store.set(f"ask {rank} {ask}", "")
        theirs_s = float(store.get(f"time {rank} {ask}"))
        after_s = time.time()
        found.append((after_s - before_s, (before_s + after_s) / 2 - theirs_s))
    return min(found)[1]


def leave_token(store: dist.Store, folder: Path) -> Path | None:
    """Rank 0: a new file in `folder`, named and told through the store. None if it cannot be written."""
    token = secrets.token_hex(16)
    path = folder / f".moesys_doctor_{token}"
    try:
        with path.open("x") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        store.set("token", "")
        return None
    store.set("token", token)
    return path


def sees_token(store: dist.Store, folder: Path) -> bool:
    """Whether rank 0's file is there with what it wrote; as it is told through the store."""
    token = store.get("token").decode()
    deadline_s = time.monotonic() + VISIBLE_WITHIN_S
    while token:
        try:
            if (folder / f".moesys_doctor_{token}").read_text() == token:
                return True
            os.listdir(folder)  # asks a network file system for the folder anew
        except OSError:
            pass
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.1)
    return False
