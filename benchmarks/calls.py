"""Time that a step spends in torch.distributed on the thread that computes, and what its calls take by themselves.

Calls of a process group and waits for them are noted in order, then made again without the step. No benchmark itself.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

CALLS = (
    *("allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "all_gather_single"),
    *("_reduce_scatter_base", "reduce_scatter_single", "alltoall_base", "all_to_all_single"),
    *("broadcast", "send", "recv"),
)
"""Methods of ProcessGroup, of whatever version of torch has them."""


class Calls:
    """What a step asked of process groups, and how long it stood there."""

    def __init__(self) -> None:
        self.made: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        """With tensors like those of the step, which may be freed by now."""
        self.order: list[tuple[str, int]] = []
        """("call", its place in `made`), and ("wait", the same)."""
        self.exposed_s = 0.0
        self._works: list[Any] = []  # held, so that no two have one id
        self._place: dict[int, int] = {}
        self._depth = 0

    @torch.no_grad()
    def again(self) -> float:
        """Collective: make the same calls and waits with nothing in between; seconds."""
        works: dict[int, Any] = {}
        dist.barrier()
        began = time.perf_counter()
        for kind, place in self.order:
            if kind == "call":
                method, args, options = self.made[place]
                works[place] = method(*args, **options)
            elif works[place] is not None:
                works[place].wait()
        return time.perf_counter() - began

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within, calls and waits are noted and timed."""
        group, work = dist.ProcessGroup, dist.Work
        # From the classes' own tables: what getattr gives would be no method once set again.
        kept = {name: vars(group)[name] for name in CALLS if name in vars(group)}
        wait = vars(work)["wait"]
        for name, method in kept.items():
            setattr(group, name, self._noted(method))
        setattr(work, "wait", self._noted_wait(wait))  # noqa: B010 (a class of C++)
        try:
            yield
        finally:
            for name, method in kept.items():
                setattr(group, name, method)
            setattr(work, "wait", wait)  # noqa: B010

    def _noted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with self._timed() as is_outermost:
                work = method(*args, **options)
            if is_outermost:
                self._place[id(work)] = len(self.made)
                self._works.append(work)
                self.order.append(("call", len(self.made)))
                self.made.append(
                    (method, *tree_map_only(Tensor, torch.zeros_like, (args, options)))
                )
            return work

        return call

    def _noted_wait(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def call(work: Any, *args: Any, **options: Any) -> Any:
            with self._timed():
                done = wait(work, *args, **options)
            if id(work) in self._place:
                self.order.append(("wait", self._place[id(work)]))
            return done

        return call

    @contextmanager
    def _timed(self) -> Iterator[bool]:
        self._depth += 1
        began = time.perf_counter()
        try:
            yield self._depth == 1
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.exposed_s += time.perf_counter() - began


def overlap(step: Callable[[], object], repetitions: int = 5) -> tuple[float, float]:
    """Collective: (exposed, alone) milliseconds, medians over some steps."""
    exposed, alone = [], []
    for _ in range(repetitions):
        calls = Calls()
        with calls.noting():
            step()
        exposed.append(calls.exposed_s * 1e3)
        alone.append(calls.again() * 1e3)
    return statistics.median(exposed), statistics.median(alone)
