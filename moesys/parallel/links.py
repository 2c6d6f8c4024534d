"""How fast the links of a group are, as copies of experts use them: timed by exchanges of a few sizes."""

import time

import torch
import torch.distributed as dist

from moesys.parallel.sparse import SparseCollectives
from moesys.plan.links import Link, Links, Timed, fitted_link

GROWTH = 8
SIZES = tuple(GROWTH**power for power in range(4, 9))
"""Bytes that a rank sends and gets at once: 4 KiB to 16 MiB."""
REPEATS, REPEATING_S = 5, 0.1
"""Exchanges of a size, and how long they may take together; one in any case."""
LONGEST_S = 0.4
"""No exchange that may be expected to take longer."""


def measured_links(group: dist.ProcessGroup, per_node: int, device: torch.device) -> Links:
    """Of all groups of a job at once, whose ranks r are on node r // per_node of their group; the slowest count, and all
    ranks have the same to the bit. Collective for all ranks of the job.

    It takes up to 0.6 s for each kind of link, and memory for twice 16 MiB; longer only where 32 KiB of each rank of a node
    take above 0.1 s.
    """
    probe = _Probe(SparseCollectives(group, per_node), device)
    rank, size = probe.collectives.rank, probe.collectives.size
    first, place = rank - rank % per_node, rank % per_node
    inside = probe.link(
        to=first + (place + 1) % per_node, from_=first + (place - 1) % per_node, sharing=1
    )
    between = probe.link(
        to=(rank + per_node) % size, from_=(rank - per_node) % size, sharing=per_node
    )
    return Links(inside=inside, between=between)


class _Probe:
    """Times exchanges on one rank."""

    def __init__(self, collectives: SparseCollectives, device: torch.device) -> None:
        self.collectives, self.device = collectives, device

    def link(self, to: int, from_: int, sharing: int) -> Link | None:
        """That `sharing` ranks use at once, each sending to `to`; None where no rank of the job has another to send to."""
        is_away = to != self.collectives.rank
        (most,) = self._most([sharing if is_away else 0.0])
        if not most:
            return None
        timed: list[Timed] = []

        def slowest_s(size: int, repeats: int) -> list[float]:
            own = (self._seconds(size, to, from_) if is_away else 0.0 for _ in range(repeats))
            return self._most([*own])

        slowest_s(SIZES[0], 1)  # makes the connections
        for size in SIZES:
            if len(timed) >= 2 and GROWTH * timed[-1].seconds[0] > LONGEST_S:
                break
            (first_s,) = slowest_s(size, 1)
            repeats = min(REPEATS, int(REPEATING_S / first_s))
            others_s = slowest_s(size, repeats - 1) if repeats > 1 else []
            timed.append(Timed(size * most, [first_s, *others_s]))
        return fitted_link(timed)

    def _most(self, own: list[float]) -> list[float]:
        """Of all ranks, each number by itself."""
        most = torch.tensor(own, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most.tolist()

    def _seconds(self, size: int, to: int, from_: int) -> float:
        sent = torch.zeros(size, dtype=torch.uint8, device=self.device)
        received = torch.empty_like(sent)
        self._synchronize()
        began = time.perf_counter()
        work = self.collectives.exchange(sent, [(to, size)], received, [(from_, size)])
        self.collectives.wait(work)
        self._synchronize()
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
