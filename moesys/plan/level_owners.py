"""Which rank owns which experts of all layers, so that nodes have equal loads and few copies need to leave their owners'. Pure.

Shapes: M MoE layers, E experts, P ranks (`per_node` of each node one after another), N nodes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesys.plan.placement import Amounts, Integers, Nodes
from moesys.plan.sharding import Owners, owned_at_most

FULL = 1.05
"""Times a node's mean load: an expert with more will have copies on other nodes."""
LATER = 2.0
"""Times its even part of a layer's experts, that a node may have to own of each layer that comes after."""


def level_owners(
    loads_M: Sequence[Amounts],
    num_ranks: int,
    per_node: int,
    near_M: Sequence[NDArray[np.bool_]] | None = None,
) -> Owners:
    """Experts go, layer by layer and from the hottest, to the node that will have the least load of the layer, there to the rank
    with the least; a rank owns `owned_at_most` experts of all layers, and of one layer any number.

    One with more load than a node should have counts in equal parts on several, and those of `near_M`, which all nodes will
    have, on all: copies are for levelling them. The nodes that own such are to have about as many of them each.
    """
    number_M = [len(loads_E) for loads_E in loads_M]
    most, left = owned_at_most(number_M, num_ranks), sum(number_M)
    # Where ranks have a place more than is needed, the last ones lack it.
    free_P = most - (np.arange(num_ranks) >= num_ranks - (most * num_ranks - left))
    nodes = Nodes(num_ranks=num_ranks, per_node=per_node)
    owners = [np.full(number, -1, dtype=np.int64) for number in number_M]
    for layer in sorted(range(len(owners)), key=lambda m: (-loads_M[m].max(), m)):
        loads_E = loads_M[layer]
        left -= len(loads_E)
        mean = max(float(loads_E.sum()), 1e-30) / nodes.number
        parts_E = np.clip(np.ceil(loads_E / (FULL * mean)), 1, nodes.number)
        if near_M is not None:
            parts_E = np.where(near_M[layer], nodes.number, parts_E)
        later = LATER * left / nodes.number
        owners[layer] = _owners(loads_E / parts_E, parts_E.astype(np.int64), free_P, nodes, later)
    return owners


def _owners(
    part_E: Amounts, parts_E: Integers, free_P: Integers, nodes: Nodes, later: float
) -> Integers:
    """Of one layer; takes places of `free_P`, of which a node can leave so many to later layers."""
    owner_E = np.empty(len(part_E), dtype=np.int64)
    free_N = nodes.sums(free_P[:, None])[:, 0]
    load_N, split_N = np.zeros(nodes.number), np.zeros(nodes.number, dtype=np.int64)
    load_P = np.zeros(len(free_P))
    hottest_first = np.argsort(-part_E, kind="stable")
    mean_of_rest = part_E[hottest_first][::-1].cumsum()[::-1] / np.arange(len(part_E), 0, -1)
    for expert, cold in zip(hottest_first.tolist(), mean_of_rest.tolist(), strict=True):
        # Places that must be filled in this layer will be, with experts of which the mean is known.
        will_have_N = load_N + cold * np.maximum(free_N - later, 0.0)
        # Of equals that with fewer places: the many cold ones need those of the others.
        by_load = np.lexsort((free_N, will_have_N))
        have_place = by_load[free_N[by_load] > 0]
        is_split = parts_E[expert] > 1
        at = by_load[: parts_E[expert]] if is_split else have_place[:1]
        may_own = np.intersect1d(at, have_place) if is_split else at
        may_own = may_own if len(may_own) else have_place
        node = min(may_own.tolist(), key=lambda n: (split_N[n], -free_N[n], n))
        split_N[node] += is_split
        load_N[at] += part_E[expert]
        first = node * nodes.per_node
        ranks = range(first, min(first + nodes.per_node, len(free_P)))
        rank = min(
            (rank for rank in ranks if free_P[rank]), key=lambda r: (load_P[r], free_P[r], r)
        )
        owner_E[expert] = rank
        load_P[rank] += part_E[expert]
        free_P[rank] -= 1
        free_N[node] -= 1
    return owner_E
