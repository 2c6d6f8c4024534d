"""Which rank owns which experts of all layers: by load (Hecate, 2502.02581, algorithm 2). Pure.

Shapes: M MoE layers, E experts, P ranks (`per_node` of each node one after another).
"""

import heapq
from collections.abc import Sequence

import numpy as np

from moesys.plan.placement import Amounts, Integers, even_owners

Owners = list[Integers]
"""[M][E]; layers may have different numbers of experts."""


def owned_at_most(num_experts_M: Sequence[int], num_ranks: int) -> int:
    """Experts of all layers that a rank owns at most, so that memory is level."""
    return -(-sum(num_experts_M) // num_ranks)


def first_owners(num_experts_M: Sequence[int], num_ranks: int) -> Owners:
    """Before loads are known: in order, each rank as many of each layer where they divide, of all layers together elsewhere."""
    if all(num_experts % num_ranks == 0 for num_experts in num_experts_M):
        return [even_owners(n, num_ranks) for n in num_experts_M]
    starts = np.cumsum([0, *num_experts_M])
    return [
        (np.arange(start, start + n) * num_ranks) // int(starts[-1])
        for start, n in zip(starts, num_experts_M, strict=False)
    ]


def heterogeneous_sharding(
    loads_ME: Sequence[Amounts], num_ranks: int, per_node: int, overlap_degree: int
) -> Owners:
    """Owners such that the experts which are not copied anyway load the ranks evenly, layer by layer.

    The `overlap_degree` hottest of each layer will be copied, and fill what places are left. The others go, from the
    layer with the highest load on, from the hottest, each to the node with the least load of this layer, there to the
    rank with the least; of equals to that with fewer free places. A rank owns `owned_at_most` experts of all layers,
    and of one layer any number.
    """
    num_experts_M = [len(loads_E) for loads_E in loads_ME]
    most = owned_at_most(num_experts_M, num_ranks)
    places = _FreePlaces(num_ranks, per_node, most, sum(num_experts_M))
    owners = [np.full(number, -1, dtype=np.int64) for number in num_experts_M]
    hottest_first = [np.argsort(-loads_E, kind="stable") for loads_E in loads_ME]
    by_load = sorted(range(len(owners)), key=lambda m: (-loads_ME[m].max(), m))
    for layer in by_load:
        places.begin_layer()
        for expert in hottest_first[layer][overlap_degree:].tolist():
            owners[layer][expert] = places.take(float(loads_ME[layer][expert]))
    for layer in by_load:
        places.begin_layer()
        for expert in hottest_first[layer][:overlap_degree].tolist():
            owners[layer][expert] = places.take(float(loads_ME[layer][expert]))
    return owners


class _FreePlaces:
    """Nodes and their ranks in heaps, by (load of this layer, free places)."""

    def __init__(self, num_ranks: int, per_node: int, most: int, num_experts: int) -> None:
        self.per_node = per_node
        # Where ranks have a place more than is needed, the last ones lack it.
        spare = most * num_ranks - num_experts
        self.free_P = [most - (rank >= num_ranks - spare) for rank in range(num_ranks)]
        self.nodes = -(-num_ranks // per_node)

    def begin_layer(self) -> None:
        ranks = len(self.free_P)
        self.load_P = [0.0] * ranks
        self.of_node = [
            [
                (0.0, self.free_P[rank], rank)
                for rank in range(node * self.per_node, min(ranks, (node + 1) * self.per_node))
                if self.free_P[rank]
            ]
            for node in range(self.nodes)
        ]
        self.free_N = [sum(free for _, free, _ in heap) for heap in self.of_node]
        self.heap = [
            (0.0, self.free_N[node], node) for node in range(self.nodes) if self.free_N[node]
        ]
        for heap in (self.heap, *self.of_node):
            heapq.heapify(heap)

    def take(self, load: float) -> int:
        """The rank that the next expert goes to."""
        node_load, _, node = heapq.heappop(self.heap)
        rank_load, free, rank = heapq.heappop(self.of_node[node])
        self.free_P[rank] -= 1
        self.free_N[node] -= 1
        if free > 1:
            heapq.heappush(self.of_node[node], (rank_load + load, free - 1, rank))
        if self.free_N[node]:
            heapq.heappush(self.heap, (node_load + load, self.free_N[node], node))
        return rank


def moved(before: Owners, after: Owners) -> list[tuple[int, int, int, int]]:
    """(layer, expert, from rank, to rank) of each expert that changes its owner."""
    return [
        (layer, int(expert), int(old_E[expert]), int(new_E[expert]))
        for layer, (old_E, new_E) in enumerate(zip(before, after, strict=True))
        for expert in np.flatnonzero(old_E != new_E)
    ]
