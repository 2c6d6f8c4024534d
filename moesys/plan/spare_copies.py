"""Copies beyond those that level the predicted loads, for loads that come otherwise. Pure.

Shapes: E experts, P ranks, C copies that a rank may hold.
"""

import numpy as np

from moesys.plan.placement import Amounts, Nodes, Placement, placement_of


def with_spare(loads_E: Amounts, placement: Placement, per_node: int, least: int) -> Placement:
    """Every rank with at least `least` copies, as far as there are experts that it has not: one more of the expert with the most
    load per holder, on a node with the fewest holders of it, on the rank there that holds the fewest copies."""
    num_ranks = placement.num_ranks
    nodes = Nodes(num_ranks=num_ranks, per_node=per_node)
    copies_PC, used_P = placement.copies_PC.copy(), (placement.copies_PC >= 0).sum(1)
    holds_EP = placement.holders_EP()
    holders_E = holds_EP.sum(1)
    while True:
        may_EP = ~holds_EP & (used_P < least)
        may_E = may_EP.any(1)
        if not may_E.any():
            return placement_of(placement.owner_E, copies_PC)
        expert = int(np.where(may_E, loads_E / holders_E, -1.0).argmax())
        has_N = np.bincount(nodes.node_P, holds_EP[expert], nodes.number)
        order = np.lexsort((used_P, has_N[nodes.node_P], ~may_EP[expert]))
        rank = int(order[0])
        copies_PC[rank, used_P[rank]] = expert
        used_P[rank] += 1
        holds_EP[expert, rank] = True
        holders_E[expert] += 1
