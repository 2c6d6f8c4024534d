"""Run a function on many gloo ranks of this machine, and get its results back.

    def job(rank: int, world_size: int, scale: float) -> float: ...
    results = run_ranks(job, 4, 2.0)     # [rank 0's, rank 1's, ...]

The function and its arguments must be picklable (a module-level function). Ports, environment,
teardown and timeouts are hidden; a rank's exception is raised here with its traceback.
"""

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["moesys.testing.small_run"])  # what most ranks import, torch too


class RankError(RuntimeError):
    """A rank raised, died or hung."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    threads: int = 1,
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` gloo ranks; return their results in rank order.

    Results travel through a pipe, so return plain values or CPU tensors (they are copied).
    """
    results: Any = _context.Queue()
    with tempfile.TemporaryDirectory(prefix="moesys_ranks_") as folder:
        store = os.path.join(folder, "store")
        ranks = [
            _context.Process(
                target=_run_rank,
                args=(rank, world_size, store, timeout_s, threads, results, function, args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, results, timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(ranks: list[Any], results: Any, timeout_s: float) -> list[Any]:
    import pickle

    outcome: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    dead_since: float | None = None
    while len(outcome) < len(ranks):
        try:
            rank, error, payload = results.get(timeout=0.2)
        except queue.Empty:
            missing = [r for r in range(len(ranks)) if r not in outcome]
            dead = [r for r in missing if not ranks[r].is_alive()]
            # A finished rank's result may still be in the pipe: give it a moment.
            dead_since = dead_since or (time.monotonic() if dead else None)
            if dead and dead_since is not None and time.monotonic() - dead_since > 2.0:
                codes = {r: ranks[r].exitcode for r in dead}
                raise RankError(f"ranks died without a result, exit codes {codes}") from None
            if time.monotonic() > deadline:
                raise RankError(f"no result from ranks {missing} within {timeout_s} s") from None
            continue
        if error is not None:
            raise RankError(f"rank {rank} failed:\n{error}")
        outcome[rank] = pickle.loads(payload)
    return [outcome[r] for r in range(len(ranks))]


def _run_rank(
    rank: int,
    world_size: int,
    store: str,
    timeout_s: float,
    threads: int,
    results: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import pickle

    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        value = function(rank, world_size, *args)
        # Pickled here: a tensor put on the queue would be shared through a file descriptor that dies with us.
        results.put((rank, None, pickle.dumps(value)))
        dist.barrier()
    except BaseException:
        results.put((rank, traceback.format_exc(), b""))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
