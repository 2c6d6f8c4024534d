"""Experts packed anew over nodes and ranks, the hottest several times: EPLB's hierarchical balance (DeepSeek-V3, 2412.19437,
section 3.4). Pure.

Shapes: E experts, P ranks (G of each node one after another), C copies that a rank may hold.
"""

import heapq

import numpy as np

from moesys.plan.placement import Amounts, Integers, Placement, placement_of


def replicated(loads_E: Amounts, num_ranks: int, per_node: int, most_copies: int) -> Placement:
    """Experts are packed into nodes, as many into each; in a node those with the most load per replica get one more, until
    each rank's E / P + C places are filled; replicas are packed into the node's ranks.

    Any of its replicas' ranks may own an expert, as long as every rank owns E / P of them.
    """
    if num_ranks % per_node or len(loads_E) % num_ranks:
        raise ValueError(
            f"{len(loads_E)} experts are not spread evenly over {num_ranks} ranks of nodes of {per_node}"
        )
    nodes, own = num_ranks // per_node, len(loads_E) // num_ranks
    owner_E = np.empty(len(loads_E), dtype=np.int64)
    copies_PC = np.full((num_ranks, most_copies), -1, dtype=np.int64)
    node_E = _packed(loads_E, nodes, len(loads_E) // nodes)
    for node in range(nodes):
        experts = np.flatnonzero(node_E == node)
        first = node * per_node
        held = _held(loads_E[experts], per_node, own + most_copies)
        owners = _owners([[int(experts[i]) for i in row] for row in held], experts, own)
        for expert, rank in owners.items():
            owner_E[expert] = first + rank
        for rank, row in enumerate(held):
            copies = [int(experts[i]) for i in row if owners[int(experts[i])] != rank]
            copies_PC[first + rank, : len(copies[:most_copies])] = copies[:most_copies]
    return placement_of(owner_E, copies_PC)


def _packed(loads_X: Amounts, packs: int, size: int) -> Integers:
    """The pack of each, `size` in each: from the heaviest, to the lightest pack with room."""
    heap = [(0.0, 0, pack) for pack in range(packs)]
    pack_X = np.empty(len(loads_X), dtype=np.int64)
    for x in np.argsort(-loads_X, kind="stable"):
        load, used, pack = heapq.heappop(heap)
        pack_X[x] = pack
        if used + 1 < size:
            heapq.heappush(heap, (load + float(loads_X[x]), used + 1, pack))
    return pack_X


def _held(loads_X: Amounts, ranks: int, places: int) -> list[list[int]]:
    """Which of a node's experts each of its ranks holds, at most `places` and none twice."""
    number_X = np.ones(len(loads_X), dtype=np.int64)
    heap = [(-float(load), x) for x, load in enumerate(loads_X)]
    heapq.heapify(heap)
    for _ in range(ranks * places - len(loads_X)):
        if not heap:
            break
        _, x = heapq.heappop(heap)
        number_X[x] += 1
        if number_X[x] < ranks:
            heapq.heappush(heap, (-float(loads_X[x]) / number_X[x], x))
    held: list[list[int]] = [[] for _ in range(ranks)]
    load_R = np.zeros(ranks)
    per_replica_X = loads_X / number_X
    for x in np.argsort(-per_replica_X, kind="stable").tolist():
        has_room = [rank for rank in range(ranks) if len(held[rank]) < places]
        for rank in sorted(has_room, key=lambda rank: load_R[rank])[: number_X[x]]:
            held[rank].append(x)
            load_R[rank] += per_replica_X[x]
    return held


def _owners(held: list[list[int]], experts: Integers, own: int) -> dict[int, int]:
    """A rank for each expert, `own` for each rank: one that holds it, where augmenting paths find such."""
    ranks_of: dict[int, list[int]] = {int(e): [] for e in experts}
    for rank, row in enumerate(held):
        for expert in row:
            ranks_of[expert].append(rank)
    owned: list[set[int]] = [set() for _ in held]
    owner: dict[int, int] = {}

    def place(expert: int, seen: set[int]) -> bool:
        for rank in ranks_of[expert]:
            if rank in seen:
                continue
            seen.add(rank)
            room = len(owned[rank]) < own
            for other in [] if room else sorted(owned[rank]):
                owned[rank].remove(other)
                if place(other, seen):
                    room = True
                    break
                owned[rank].add(other)
            if room:
                owned[rank].add(expert)
                owner[expert] = rank
                return True
        return False

    for expert in sorted(ranks_of, key=lambda e: len(ranks_of[e])):
        if not place(expert, set()):
            rank = min(range(len(held)), key=lambda r: len(owned[r]))
            owned[rank].add(expert)
            owner[expert] = rank
    return owner
