"""Ranks that keep computing longer than the others: what is measured, and from when on it is said.

A rank's compute time of a step is its data, forward and backward sections without the time inside the
exchanges of rows between expert ranks. What that leaves in and out:

- Waits inside an exchange and everything from the gradients' sum on are left out, so with data and expert parallelism
  a rank that waits for a slow one is not slow itself.
- Waits in tensor, context and pipeline transfers and in FSDP's gathers are inside the sections. There a rank that waits
  looks as slow as the one it waits for: ratios go towards 1, and a straggler may be missed, but none is
  blamed for another's delay.
- On CPUs (gloo) it is wall time of a call that blocks. On GPUs (NCCL) sections are the time between two events on the
  device: kernels, and gaps in which a slow host left the device without work.
- A rank whose experts get more tokens computes longer on a sound machine: compare with the load of the step.

Shapes: G gathers, W ranks.
"""

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

WINDOW_GATHERS = 3
"""In so many gathers in a row a rank must be slow."""
_SECTIONS = ("data", "forward", "backward")


def slow_ranks(compute_ms_GW: Sequence[Sequence[float]], limit_ratio: float) -> dict[int, float]:
    """Ranks that took at least `limit_ratio` times the median rank's time in every gather, with their median ratio.

    The median of an even number of ranks is the lower one: of two ranks the slower can be found.
    """
    if not compute_ms_GW:
        return {}
    ratios_GW = [ratios(compute_ms_W) for compute_ms_W in compute_ms_GW]
    ranks = range(len(compute_ms_GW[0]))
    return {
        rank: statistics.median(ratios_W[rank] for ratios_W in ratios_GW)
        for rank in ranks
        if all(ratios_W[rank] >= limit_ratio for ratios_W in ratios_GW)
    }


def ratios(compute_ms_W: Sequence[float]) -> list[float]:
    """Each rank's time over the median rank's; 1 for all where that took none."""
    median_ms = statistics.median_low(compute_ms_W)
    return [ms / median_ms if median_ms > 0 else 1.0 for ms in compute_ms_W]


class StragglerWatch:
    """Every rank's compute time between gathers; on the rank that is given the gathers, who is slow.

    A gather has each rank's median step since the one before, so that no single slow step makes a straggler.
    """

    def __init__(self, *, every_steps: int, limit_ratio: float, nodes: Sequence[str]) -> None:
        """`every_steps`: between gathers, 0 = none. `nodes`: the name of each rank's."""
        self._every_steps = every_steps if len(nodes) > 1 else 0
        self._limit_ratio = limit_ratio
        self._nodes = nodes
        self._compute_ms: list[float] = []
        self._gathers: deque[Sequence[float]] = deque(maxlen=WINDOW_GATHERS)
        self._told: set[int] = set()

    def add(self, sections_ms: Mapping[str, float], exchange_ms: float) -> None:
        """A step of this rank."""
        if self._every_steps:
            spent_ms = sum(sections_ms.get(name, 0.0) for name in _SECTIONS)
            self._compute_ms.append(max(0.0, spent_ms - exchange_ms))

    def due(self, step: int) -> float | None:
        """What this rank gives to the others in `step`, of the steps before; None where no gather is due.

        All ranks that made the same steps agree on when.
        """
        if not self._every_steps or step % self._every_steps or not self._compute_ms:
            return None
        median_ms = statistics.median(self._compute_ms)
        self._compute_ms.clear()
        return median_ms

    def found(self, step: int, compute_ms_W: Sequence[float]) -> list[dict[str, Any]]:
        """The `straggler` records of a gather: of each rank that has become slow, once until it is not.

        `compute_ms_W`: what each rank gave; empty where no gather was due.
        """
        if not compute_ms_W:
            return []
        self._gathers.append(compute_ms_W)
        full = len(self._gathers) == WINDOW_GATHERS
        slow = slow_ranks(self._gathers, self._limit_ratio) if full else {}
        new = sorted(slow.keys() - self._told)
        self._told = set(slow)
        return [
            {
                "kind": "straggler",
                "step": step,
                "rank": rank,
                "node": self._nodes[rank],
                "ratio": slow[rank],
                "window": WINDOW_GATHERS * self._every_steps,
            }
            for rank in new
        ]


def straggler_line(record: Mapping[str, Any]) -> str:
    """A `straggler` record for people."""
    return (
        f"straggler: rank {record['rank']} on {record['node']} computes {record['ratio']:.2f} times as long as "
        f"the median rank, for {record['window']} steps"
    )
