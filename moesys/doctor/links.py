"""Times what nodes send each other: every pair alone on its two nodes, all pairs of a round at once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moesys.doctor.report import LinkTime
from moesys.doctor.tournament import Round

PING_BYTES = 8
NUM_PINGS = 5
NUM_EXCHANGES = 3
MAX_ROUNDS, QUICK_MAX_ROUNDS = 128, 8
"""All pairs of up to 128 nodes; of more each node's links to 128 others tell enough."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    exchange_bytes: int
    max_rounds: int


def sizes(device: torch.device, quick: bool) -> Sizes:
    """A CPU moves some GB/s, a GPU a hundred; 1 MiB takes about 1 ms, 64 MiB too."""
    small, large = (2**24, 2**26) if device.type == "cuda" else (2**20, 2**22)
    return Sizes(
        exchange_bytes=small if quick else large,
        max_rounds=QUICK_MAX_ROUNDS if quick else MAX_ROUNDS,
    )


@dataclass(frozen=True, kw_only=True)
class Rails:
    """Ranks by node: the k-th rank of each node is its rail k. As many rails as the smallest node has ranks."""

    nodes: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    """Of each node, one per rail."""

    @staticmethod
    def of(node_of_rank: Sequence[str]) -> "Rails":
        every: dict[str, list[int]] = {}
        for rank, node in enumerate(node_of_rank):
            every.setdefault(node, []).append(rank)
        count = min(map(len, every.values()))
        return Rails(
            nodes=tuple(every), ranks=tuple(tuple(ranks[:count]) for ranks in every.values())
        )

    def find(self, rank: int) -> tuple[int, int] | None:
        """Node and rail of a rank, by position; None if it has no rail."""
        for node, ranks in enumerate(self.ranks):
            if rank in ranks:
                return node, ranks.index(rank)
        return None


def time_links(
    rank: int, rails: Rails, schedule: Sequence[Round], size_bytes: int, device: torch.device
) -> list[LinkTime]:
    """Collective. What this rank measured with the partner of each round; none of a rank without a rail."""
    place = rails.find(rank)
    found: list[LinkTime] = []
    for pairs in schedule:
        # Else a pair of the next round meets links that this one still uses.
        dist.barrier()
        if place is None:
            continue
        node, rail = place
        for i, j in pairs:
            if node in (i, j):
                other = j if node == i else i
                peer = rails.ranks[other][rail]
                found.append(
                    LinkTime(
                        node=other,
                        round_trip_s=round_trip_s(peer, rank < peer, device),
                        exchange_s=exchange_s(peer, size_bytes, device),
                    )
                )
    dist.barrier()
    return found


def round_trip_s(peer: int, is_first: bool, device: torch.device) -> float:
    """The least of NUM_PINGS, after one that makes the connection."""
    ping = torch.zeros(PING_BYTES, dtype=torch.uint8, device=device)
    seconds: list[float] = []
    for _ in range(1 + NUM_PINGS):
        start_s = time.perf_counter()
        for sends in (is_first, not is_first):
            if sends:
                dist.send(ping, peer)
            else:
                dist.recv(ping, peer)
        _wait(device)
        seconds.append(time.perf_counter() - start_s)
    return min(seconds[1:])


def exchange_s(peer: int, size_bytes: int, device: torch.device) -> float:
    """The least of NUM_EXCHANGES: `size_bytes` each way at once."""
    sent = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    seconds: list[float] = []
    for _ in range(1 + NUM_EXCHANGES):
        start_s = time.perf_counter()
        requests = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
        )
        for request in requests:
            request.wait()
        _wait(device)
        seconds.append(time.perf_counter() - start_s)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
