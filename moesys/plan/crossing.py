"""How much crosses the busiest uplink, of rows and of copies of experts, before any of it is known to the row. Pure.

Shapes: E experts, N nodes, P ranks, H pairs of an expert and a rank that holds it.
"""

import math

import numpy as np

from moesys.plan.placement import Amounts, Nodes, Placement


def crossing_rows(
    loads_E: Amounts,
    placement: Placement,
    amounts_H: Amounts,
    per_node: int,
    rows_per_copy: float,
) -> float:
    """One way through a rank's part of the busiest uplink, if all nodes have like rows, which each serves itself where it can.

    Rows come to a node, or leave it. A copy and its gradient, which are as many bytes as `rows_per_copy` rows, cross from the
    owner's rank to each other node that holds it. Nobody knows whether ranks have uplinks of their own, or those of a node share
    one: it is the geometric mean of both.

    Args:
        amounts_H: what each pair serves of its expert's load.
    """
    num_ranks, pairs = placement.num_ranks, placement.pairs
    nodes = Nodes(num_ranks=num_ranks, per_node=per_node)
    node_H, at_H = nodes.node_P[pairs.rank_H], (nodes.node_P[pairs.rank_H], pairs.expert_H)
    served_NE = np.zeros((nodes.number, len(loads_E)))
    np.add.at(served_NE, at_H, amounts_H)
    has_NE = np.zeros(served_NE.shape, dtype=np.bool_)
    has_NE[at_H] = True
    stay_NE = np.minimum(served_NE, loads_E / nodes.number)
    comes_H = amounts_H * (1 - stay_NE[at_H] / np.maximum(served_NE[at_H], 1e-30))
    leave_N = (loads_E / nodes.number - stay_NE).sum(1)

    further_E = has_NE.sum(0) - 1
    owner_node_E = nodes.node_P[placement.owner_E]
    gone_P = np.bincount(placement.owner_E, further_E, num_ranks)
    gone_N = np.bincount(owner_node_E, further_E, nodes.number)
    got_N = has_NE.sum(1) - np.bincount(owner_node_E, minlength=nodes.number)

    come = np.bincount(node_H, comes_H, nodes.number).max()
    of_node = max(come, leave_N.max()) + rows_per_copy * max(gone_N.max(), got_N.max())
    come = np.bincount(pairs.rank_H, comes_H, num_ranks).max()
    got = math.ceil(got_N.max() / per_node)
    of_rank = max(come, leave_N.max() / per_node) + rows_per_copy * max(gone_P.max(), got)
    return math.sqrt(of_node / per_node * of_rank)
