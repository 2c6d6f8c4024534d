"""Rows that one MoE layer of a rank sends in a forward, from the routing. Pure.

Shapes: E experts, T tokens of a rank with K slots each, P ranks of ep and S of etp, G ranks of ep on each of M nodes: rank n * G + i
is the i-th of node n.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from moesys.plan.placement import expert_places

Slots = Sequence[Sequence[Sequence[int]]]
"""[P][S][E]: slots per expert of each rank."""
Ids = Sequence[Sequence[Sequence[Sequence[int]]]]
"""[P][S][T][K]: each rank's routing, -1 = no expert."""


class Ways(NamedTuple):
    """Rows that a rank sends; the backward sends as many the other way."""

    there: int = 0
    """On their way to experts."""
    back: int = 0
    """On the way home."""


class RowsSent(NamedTuple):
    """Of one rank."""

    ep: Ways = Ways()
    """To other ranks of ep, from rank to rank."""
    inside: Ways = Ways()
    """To other ranks of ep on this node, where an exchange goes by nodes."""
    across: Ways = Ways()
    """To those of this place on other nodes."""
    copied: int = 0
    """What arrived here, to the other etp ranks."""
    partial: int = 0
    """Partial results of what arrived at other etp ranks, back to them."""


def rows_sent(
    slots: Slots, ep_rank: int, etp_rank: int, num_classes: int = 1, per_node: int | None = None
) -> RowsSent:
    """By the flat exchange, or with `per_node` = G by the hierarchical one. `num_classes` of experts of different widths."""
    between = _between(slots, etp_rank, num_classes)
    copied, partial = _slices(slots, ep_rank, etp_rank, num_classes)
    if per_node is None:
        others = [p for p in range(len(slots)) if p != ep_rank]
        there = sum(between(ep_rank, p) for p in others)
        back = sum(between(p, ep_rank) for p in others)
        return RowsSent(ep=Ways(there, back), copied=copied, partial=partial)
    neighbours, rail = _neighbours(ep_rank, per_node), _rail(ep_rank, per_node, len(slots))
    inside = Ways(
        sum(between(ep_rank, p) for j in neighbours for p in _place(j, per_node, len(slots))),
        sum(between(j, p) for j in neighbours for p in [ep_rank, *rail]),
    )
    node = [ep_rank, *neighbours]
    across = Ways(
        sum(between(j, p) for j in node for p in rail),
        sum(between(q, ep_rank) for p in rail for q in [p, *_neighbours(p, per_node)]),
    )
    return RowsSent(inside=inside, across=across, copied=copied, partial=partial)


def rows_sent_once(
    ids: Ids, slots: Slots, ep_rank: int, etp_rank: int, num_classes: int, per_node: int
) -> RowsSent:
    """By the exchange that sends a token to a node once; `slots` are those of `ids`."""
    between = _between(slots, etp_rank, num_classes)
    copied, partial = _slices(slots, ep_rank, etp_rank, num_classes)
    num_ranks, num_experts = len(slots), len(slots[0][0])
    places = expert_places(num_experts, num_classes, num_ranks)
    experts_of_node = num_experts // num_ranks * per_node

    def tokens(source: int, node: int) -> int:
        """Of the source that have any expert on the node."""
        return sum(
            any(e >= 0 and places[e] // experts_of_node == node for e in token)
            for token in ids[source][etp_rank]
        )

    neighbours, rail = _neighbours(ep_rank, per_node), _rail(ep_rank, per_node, num_ranks)
    across = Ways(
        sum(tokens(ep_rank, p // per_node) for p in rail),
        sum(tokens(p, ep_rank // per_node) for p in rail),
    )
    inside = Ways(
        sum(between(p, j) for j in neighbours for p in [ep_rank, *rail]),
        sum(between(p, ep_rank) for j in neighbours for p in _place(j, per_node, num_ranks)),
    )
    return RowsSent(inside=inside, across=across, copied=copied, partial=partial)


def _between(slots: Slots, etp_rank: int, num_classes: int) -> Callable[[int, int], int]:
    """Rows of a source rank for the experts of another."""
    num_experts = len(slots[0][0])
    places = expert_places(num_experts, num_classes, len(slots))
    owners = [place // (num_experts // len(slots)) for place in places]

    def between(source: int, owner: int) -> int:
        counts = slots[source][etp_rank]
        return sum(n for n, of in zip(counts, owners, strict=True) if of == owner)

    return between


def _slices(slots: Slots, ep_rank: int, etp_rank: int, num_classes: int) -> tuple[int, int]:
    """Copied and partial."""
    size = len(slots[0])
    arrived = [
        sum(_between(slots, s, num_classes)(p, ep_rank) for p in range(len(slots)))
        for s in range(size)
    ]
    return (size - 1) * arrived[etp_rank], sum(arrived) - arrived[etp_rank]


def _neighbours(rank: int, per_node: int) -> list[int]:
    """The other ranks of its node."""
    first = rank // per_node * per_node
    return [p for p in range(first, first + per_node) if p != rank]


def _place(rank: int, per_node: int, num_ranks: int) -> list[int]:
    """The ranks of its place in all nodes."""
    return list(range(rank % per_node, num_ranks, per_node))


def _rail(rank: int, per_node: int, num_ranks: int) -> list[int]:
    """The others of its place."""
    return [p for p in _place(rank, per_node, num_ranks) if p != rank]
