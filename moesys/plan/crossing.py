"""How much crosses the busiest uplink, of rows and of copies of experts, before any of it is known to the row. Pure.

Shapes: E experts, N nodes, P ranks, C copies that a rank may hold.
"""

import numpy as np

from moesys.plan.placement import Amounts, Integers, Nodes


def crossing_rows(
    loads_E: Amounts, owner_E: Integers, copies_PC: Integers, per_node: int, rows_per_copy: float
) -> float:
    """Through the busiest uplink, both ways together, if all nodes have like rows, which each serves itself where it can.

    A row crosses four times, a copy once and its gradient once, from the owner's node to each other one that holds it; in rows,
    of which `rows_per_copy` are as many bytes as a copy and its gradient.
    """
    nodes = Nodes(num_ranks=len(copies_PC), per_node=per_node)
    owner_node_E, node_P = nodes.node_P[owner_E], nodes.node_P
    has_NE = np.zeros((nodes.number, len(loads_E)), dtype=np.bool_)
    has_NE[owner_node_E, np.arange(len(loads_E))] = True
    rank_X, column_X = np.nonzero(copies_PC >= 0)
    has_NE[node_P[rank_X], copies_PC[rank_X, column_X]] = True
    holders_E = has_NE.sum(0)
    sent_NE = np.where(has_NE, 0.0, loads_E / nodes.number)
    served_NE = has_NE * (sent_NE.sum(0) / holders_E)
    away_N = np.bincount(owner_node_E, holders_E - 1, nodes.number)
    here_N = has_NE.sum(1) - np.bincount(owner_node_E, minlength=nodes.number)
    return float(((sent_NE + served_NE).sum(1) + rows_per_copy * (away_N + here_N)).max())
