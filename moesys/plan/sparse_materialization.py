"""Copies of the hottest experts by Hecate's rule (2502.02581, algorithm 1), and by FasterMoE's (PPoPP'22). Pure.

Shapes: M MoE layers, E experts, P ranks (`per_node` of each node one after another), C copies that a rank may hold of a layer.
"""

import numpy as np

from moesys.plan.placement import Amounts, Integers, Nodes


def sparse_materialization(
    loads_ME: Amounts,
    owner_ME: Integers,
    num_ranks: int,
    per_node: int,
    most_copies: int,
    overlap_degree: int,
) -> Integers:
    """int64 [M, P, C]: of the `overlap_degree` hottest experts (t), all on every rank if memory allows it; else as many of each
    as its load's share of the copies that fit, spread over nodes that have none, and over ranks with the fewest."""
    copies_MPC = np.full((len(loads_ME), num_ranks, most_copies), -1, dtype=np.int64)
    top = min(overlap_degree, loads_ME.shape[1])
    most = min(most_copies, top)
    for loads_E, owner_E, copies_PC in zip(loads_ME, owner_ME, copies_MPC, strict=True):
        hottest = np.argsort(-loads_E, kind="stable")[:top]
        if most == 0:
            continue
        if top <= most_copies:
            _everywhere(hottest, owner_E, copies_PC)
        else:
            _in_proportion(hottest, loads_E, owner_E, copies_PC, per_node)
    return copies_MPC


def hottest_everywhere(
    loads_ME: Amounts, owner_ME: Integers, num_ranks: int, num_hottest_M: Integers, most_copies: int
) -> Integers:
    """int64 [M, P, C]: of each layer so many of the hottest experts on every rank."""
    copies_MPC = np.full((len(loads_ME), num_ranks, most_copies), -1, dtype=np.int64)
    for layer, number in enumerate(num_hottest_M.tolist()):
        hottest = np.argsort(-loads_ME[layer], kind="stable")[:number]
        _everywhere(hottest, owner_ME[layer], copies_MPC[layer])
    return copies_MPC


def _everywhere(experts: Integers, owner_E: Integers, copies_PC: Integers) -> None:
    used_P = np.zeros(len(copies_PC), dtype=np.int64)
    for expert in experts.tolist():
        ranks = np.flatnonzero(owner_E[expert] != np.arange(len(copies_PC)))
        copies_PC[ranks, used_P[ranks]] = expert
        used_P[ranks] += 1


def _in_proportion(
    hottest: Integers, loads_E: Amounts, owner_E: Integers, copies_PC: Integers, per_node: int
) -> None:
    num_ranks, most = copies_PC.shape
    nodes = Nodes(num_ranks=num_ranks, per_node=per_node)
    node_P = nodes.node_P
    free_P = np.full(num_ranks, most)
    total = loads_E[hottest].sum()
    for expert in hottest.tolist():
        share = loads_E[expert] / total if total > 0 else 0.0
        wanted = min(num_ranks - 1, max(1, round(share * num_ranks * most)))
        may_P = free_P > 0
        may_P[owner_E[expert]] = False
        has_N = np.bincount([node_P[owner_E[expert]]], minlength=nodes.number)
        for _ in range(wanted):
            if not may_P.any():
                break
            free_N = np.bincount(node_P, free_P * may_P, nodes.number)
            node = int(np.lexsort((-free_N, has_N, free_N == 0))[0])
            ranks = np.flatnonzero(may_P & (node_P == node))
            rank = int(ranks[np.argmax(free_P[ranks])])
            copies_PC[rank, most - free_P[rank]] = expert
            free_P[rank] -= 1
            may_P[rank] = False
            has_N[node] += 1
