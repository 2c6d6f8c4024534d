"""Which nodes share a switch, from what they measured between each other: for networks whose plan nobody tells. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

MESSAGE_BYTES = 2**20
"""Of a message whose time says how near two nodes are: latency and bandwidth both count (Hockney's model)."""
FACTOR = 1.5
"""Two lengths of ways that differ by so much lead over other switches; below it may be noise."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Two nodes, as `moesys doctor --cluster` measured them."""

    nodes: tuple[str, str]
    gbit_per_s: float
    round_trip_us: float

    @property
    def message_s(self) -> float:
        """There, not back."""
        return self.round_trip_us / 2e6 + MESSAGE_BYTES * 8 / (self.gbit_per_s * 1e9)


def measured_addresses(nodes: Sequence[str], links: Sequence[Link]) -> dict[str, str]:
    """Each node's address `switch.switch.node`, the farthest switch first, as `topology.order_by_topology` takes them.

    A switch is a group of nodes that are nearer to each other, by FACTOR, than to the rest: single linkage, on a
    minimum spanning tree, whose edges are the shortest of many and so the least disturbed (a disturbance makes a
    way longer, never shorter). Links that were not measured are not needed, as long as others lead there. Where no
    length stands out all addresses have one level and no order follows from them.
    """
    tree = _spanning_tree(nodes, links)
    addresses = {node: node for node in nodes}
    for limit_s in _limits_s([length_s for length_s, _, _ in tree]):
        groups = _Groups(nodes)
        for length_s, a, b in tree:
            if length_s <= limit_s:
                groups.join(a, b)
        # A switch has the name of one of its nodes, which no other switch of its level has.
        addresses = {node: f"{groups.of(node)}.{addresses[node]}" for node in nodes}
    return addresses


def _limits_s(lengths_s: Sequence[float]) -> list[float]:
    """The longest way inside of a switch of each level, the nearest level first. `lengths_s`: ascending."""
    return [shorter for shorter, longer in pairwise(lengths_s) if longer >= FACTOR * shorter]


def _spanning_tree(nodes: Sequence[str], links: Sequence[Link]) -> list[tuple[float, str, str]]:
    """Length and ends of its edges, the shortest first (Kruskal's algorithm); of what is not joined, a tree each."""
    groups = _Groups(nodes)
    known: Mapping[str, int] = {node: position for position, node in enumerate(nodes)}
    ways = [link for link in links if link.nodes[0] in known and link.nodes[1] in known]
    found: list[tuple[float, str, str]] = []
    for link in sorted(ways, key=lambda w: (w.message_s, *sorted(known[n] for n in w.nodes))):
        a, b = link.nodes
        if groups.of(a) != groups.of(b):
            groups.join(a, b)
            found.append((link.message_s, a, b))
    return found


class _Groups:
    """Sets of nodes that are joined, each named by one of them (union-find)."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self._next = {node: node for node in nodes}

    def of(self, node: str) -> str:
        while (above := self._next[node]) != node:
            self._next[node] = node = self._next[above]
        return node

    def join(self, a: str, b: str) -> None:
        self._next[self.of(b)] = self.of(a)
