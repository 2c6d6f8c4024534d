"""Saves that steps need not wait for: a copy of this rank's share in host memory, which a thread puts on the disk.

What the caller waits for is the agreement on the plan and the copy. The thread hashes, writes and renames; its
collectives have a process group of their own, because those of two threads must not mix in one.
"""

import copy
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.checkpoint.plan import ChunkWrite
from moesys.checkpoint.ranks import Ranks
from moesys.checkpoint.save import Prepared, SaveResult, prepare, write

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Saved:
    result: SaveResult
    waited_s: float
    """Of its time, what the caller waited."""


class Saver:
    """The saves of one run, one at a time. Every rank makes one and makes the same calls.

    Any call but `close` raises CheckpointError, the same on all ranks, once the save under way has failed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int,
        asynchronous: bool,
        timeout_s: float = 600.0,
        check_turn: Callable[[], None] | None = None,
    ) -> None:
        """Collective. `timeout_s`: how long a rank waits for the others. `check_turn`: as in `save.write`."""
        self.directory = directory
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self.check_turn = check_turn
        self._ranks, self._thread_ranks = (Ranks(_gloo_group(timeout_s)) for _ in range(2))
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._host_copy = HostCopy()
        self._former: Prepared | None = None
        self._under_way: futures.Future[SaveResult] | None = None
        self._began_s, self._waited_s = 0.0, 0.0

    def reserve(self, tensors: Mapping[str, Tensor], rank_tensors: Mapping[str, Tensor]) -> None:
        """Do before the first step what the first save would wait for: plan, and memory for the copy. Collective."""
        self._former = prepare(0, tensors, {}, rank_tensors, self.keep_last, self._ranks)
        if self.asynchronous:
            self._host_copy.take(self._former, self._former.plan.writes[self._ranks.rank])

    def begin(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: dict[str, Any],
        rank_tensors: Mapping[str, Tensor],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Save what the arguments hold now, as `store.save`; they may change once this returns. Collective.

        The save before must have been collected. `before_commit` runs on rank 0, in whichever thread writes,
        before the folder takes its name.
        """
        assert self._under_way is None, "collect the save under way first"
        self._began_s = start_s = time.perf_counter()
        prepared = prepare(
            step, tensors, state, rank_tensors, self.keep_last, self._ranks, self._former
        )
        if self.asynchronous:
            prepared = replace(prepared, state=copy.deepcopy(state))
            chunk_of = self._host_copy.take(prepared, prepared.plan.writes[self._ranks.rank])
        else:
            chunk_of = prepared.chunk
        self._former = prepared
        self._under_way = self._thread.submit(
            write,
            prepared,
            chunk_of,
            self.directory,
            self._thread_ranks,
            before_commit,
            self.check_turn,
        )
        if not self.asynchronous:
            futures.wait([self._under_way])
        self._waited_s = time.perf_counter() - start_s

    @property
    def running_s(self) -> float:
        """How long the save under way is; 0 if there is none."""
        return time.perf_counter() - self._began_s if self._under_way is not None else 0.0

    def poll(self) -> Saved | None:
        """The save under way, once it is done on all ranks; None before, and if there is none. Collective."""
        if self._under_way is None:
            return None
        start_s = time.perf_counter()
        is_done = all(self._ranks.gather(self._under_way.done()))
        self._waited_s += time.perf_counter() - start_s
        return self._collect() if is_done else None

    def wait(self) -> Saved | None:
        """The save under way, when it is done; None if there is none."""
        if self._under_way is None:
            return None
        start_s = time.perf_counter()
        futures.wait([self._under_way])
        self._waited_s += time.perf_counter() - start_s
        return self._collect()

    def close(self) -> None:
        """Wait for the save under way and drop what came of it. Before the process group goes."""
        self._thread.shutdown()

    def _collect(self) -> Saved:
        assert self._under_way is not None
        ended, self._under_way = self._under_way, None
        return Saved(result=ended.result(), waited_s=self._waited_s)


class HostCopy:
    """Chunks of this rank in host memory, in one buffer that every save uses again."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def take(
        self, prepared: Prepared, writes: tuple[ChunkWrite, ...]
    ) -> Callable[[ChunkWrite], Tensor]:
        """Copy what `writes` write; return where each chunk is. Waits for the device."""
        parts = [prepared.part(chunk) for chunk in writes]
        starts, end = [], 0
        for part in parts:
            starts.append(end)
            end += -(-part.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        is_cuda = any(part.is_cuda for part in parts)
        if self.buffer.numel() < end:
            self.buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self.buffer = torch.empty(end, dtype=torch.uint8, pin_memory=is_cuda)
        chunks: dict[ChunkWrite, Tensor] = {}
        for chunk, part, start in zip(writes, parts, starts, strict=True):
            memory = self.buffer[start : start + part.nbytes].view(part.dtype)
            chunks[chunk] = memory.view(part.shape).copy_(part, non_blocking=True)
        if is_cuda:
            torch.cuda.current_stream().synchronize()
        return chunks.__getitem__


def _gloo_group(timeout_s: float) -> dist.ProcessGroup | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group
