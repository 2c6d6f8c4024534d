"""How experts' parameters get from their owners to the ranks that hold copies, and gradients back. Pure.

A chunk is what a collective moves of one expert: its parameters, or their gradients.

Shapes: E experts, P ranks (`per_node` of each node one after another), S stages.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

from moesys.config.placement_schema import RouteKind
from moesys.plan.links import Links
from moesys.plan.placement import Placement

ROUTE_KINDS: tuple[RouteKind, ...] = get_args(RouteKind)


class Hop(NamedTuple):
    """One chunk from one rank to another."""

    source: int
    dest: int
    expert: int


Stage = tuple[Hop, ...]
"""What travels at once, in order of source, destination, expert."""


@dataclass(frozen=True, kw_only=True)
class ChunkRoute:
    """Stages one after the other: a rank passes on only what it owns or got in an earlier one. Gradients take it backwards,
    and are summed wherever they meet."""

    kind: RouteKind
    per_node: int
    stages: tuple[Stage, ...]

    def sent_chunks(self, rank: int) -> int:
        """By a rank on the way there; it gets as many gradients as it sends chunks."""
        return sum(hop.source == rank for stage in self.stages for hop in stage)

    def arrivals(self, rank: int) -> list[int]:
        """The experts of which a rank gets copies, as they come to it: by stage, sender, expert."""
        return [hop.expert for stage in self.stages for hop in stage if hop.dest == rank]

    def crossing_chunks(self, node: int) -> tuple[int, int]:
        """That leave a node, and that come to it."""
        away = [hop for stage in self.stages for hop in stage if self._crosses(hop)]
        return (
            sum(hop.source // self.per_node == node for hop in away),
            sum(hop.dest // self.per_node == node for hop in away),
        )

    def _crosses(self, hop: Hop) -> bool:
        return hop.source // self.per_node != hop.dest // self.per_node

    def seconds(self, chunk_bytes: float, links: Links) -> float:
        """Of the slowest link of each stage, all stages together."""
        return sum(self._seconds(stage, chunk_bytes, links) for stage in self.stages)

    def _seconds(self, stage: Stage, chunk_bytes: float, links: Links) -> float:
        of_kinds = [0.0]
        for link, crosses in ((links.between, True), (links.inside, False)):
            if chunks := self._busiest(stage, crosses):
                assert link is not None, "only what has chunks is asked for"
                of_kinds.append(link.seconds(chunks * chunk_bytes))
        return max(of_kinds)

    def _busiest(self, stage: Stage, crosses: bool) -> int:
        """Chunks one way through the uplink, or the rank, with the most."""
        width = self.per_node if crosses else 1
        ends: dict[tuple[str, int], int] = {}
        for hop in stage:
            if self._crosses(hop) == crosses:
                for way, rank in (("out", hop.source), ("in", hop.dest)):
                    ends[way, rank // width] = ends.get((way, rank // width), 0) + 1
        return max(ends.values(), default=0)


def chunk_route(placement: Placement, per_node: int, kind: RouteKind) -> ChunkRoute:
    """direct: from the owner to each holder. star: from the owner to one holder of each other node, and inside nodes from
    there. relay: nodes that have a chunk pass it on, so that twice as many have it after each stage; then inside nodes.
    """
    if kind == "direct":
        stages: list[list[Hop]] = [
            [
                Hop(owner, rank, expert)
                for expert, owner, holders in _copied(placement)
                for rank in holders
            ]
        ]
    else:
        stages = _by_nodes(placement, per_node, doubles=kind == "relay")
    return ChunkRoute(
        kind=kind,
        per_node=per_node,
        stages=tuple(tuple(sorted(stage)) for stage in stages if stage),
    )


def in_order_of_arrival(placement: Placement, route: ChunkRoute) -> Placement:
    """The same copies, each rank's in the order of `arrivals`."""
    arrived: list[list[int]] = [[] for _ in range(placement.num_ranks)]
    for stage in route.stages:
        for hop in stage:
            arrived[hop.dest].append(hop.expert)
    copies_PC = placement.copies_PC.copy()
    for rank, experts in enumerate(arrived):
        copies_PC[rank, : len(experts)] = experts
    return replace(placement, copies_PC=copies_PC)


def fastest_route(
    placement: Placement, per_node: int, chunk_bytes: float, links: Links
) -> ChunkRoute:
    """Of the three, by the links as they were measured."""
    routes = [chunk_route(placement, per_node, kind) for kind in ROUTE_KINDS]
    return min(routes, key=lambda route: route.seconds(chunk_bytes, links))


def _copied(placement: Placement) -> Iterable[tuple[int, int, list[int]]]:
    """(expert, owner, ranks with copies of it) of those that have any."""
    pairs = placement.pairs
    for expert in pairs.shared.tolist():
        owner = int(placement.owner_E[expert])
        yield expert, owner, [r for r in pairs.rank_H[pairs.of(expert)].tolist() if r != owner]


def _by_nodes(placement: Placement, per_node: int, doubles: bool) -> list[list[Hop]]:
    """Stages between nodes, then one inside them."""
    gates = [0] * placement.num_ranks
    """Chunks that come to each rank from other nodes."""
    across: list[list[Hop]] = []
    inside: list[Hop] = []
    for expert, owner, holders in _copied(placement):
        has = [owner]
        of_node: dict[int, list[int]] = {}
        for rank in holders:
            of_node.setdefault(rank // per_node, []).append(rank)
        inside += [Hop(owner, rank, expert) for rank in of_node.pop(owner // per_node, [])]
        wait = []
        for ranks in of_node.values():
            gate = min(ranks, key=lambda rank: (gates[rank], rank))
            gates[gate] += 1
            wait.append(gate)
            inside += [Hop(gate, rank, expert) for rank in ranks if rank != gate]
        for stage, senders in enumerate(_senders(has, wait, doubles)):
            if stage == len(across):
                across.append([])
            across[stage] += [Hop(source, dest, expert) for source, dest in senders]
    return [*across, inside]


def _senders(
    has: Sequence[int], wait: Sequence[int], doubles: bool
) -> Iterable[list[tuple[int, int]]]:
    """(from, to) of each stage, until all who wait have it."""
    has, wait = list(has), list(wait)
    while wait:
        number = len(has) if doubles else len(wait)
        now, wait = wait[:number], wait[number:]
        yield [(has[i % len(has)], rank) for i, rank in enumerate(now)]
        has += now
