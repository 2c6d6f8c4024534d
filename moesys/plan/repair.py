"""Copies changed one at a time as long as the highest load falls. Pure.

Shapes: E experts, P ranks, C copies that a rank may hold, H pairs of an expert and a rank that holds it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moesys.plan.placement import Amounts, Integers, Nodes, Placement, placement_of
from moesys.plan.shares import MOST_SWEEPS, levelled

GOOD = 1.02
"""A highest load of so many times the mean is left as it is."""
TRIED_EXPERTS, TRIED_RANKS, TRIED_NEAR = 4, 4, 2


def expected_loads(
    loads_E: Amounts,
    placement: Placement,
    sweeps: int = MOST_SWEEPS,
    speeds_P: Amounts | None = None,
) -> tuple[Amounts, Amounts]:
    """What each holder of each expert gets [H], and each rank over its speed [P], levelled as far as it goes or as `sweeps` do."""
    speeds_P = np.ones(placement.num_ranks) if speeds_P is None else speeds_P
    pairs = placement.pairs
    number_H = np.diff(pairs.start_X)[pairs.expert_H]
    even_H = loads_E[pairs.expert_H] / number_H
    amounts_H = levelled(even_H, pairs, placement.num_ranks, speeds_P, sweeps)
    return amounts_H, pairs.loads(amounts_H, placement.num_ranks) / speeds_P


def repairs(
    loads_E: Amounts,
    placement: Placement,
    most_copies: int,
    most_steps: int,
    good: float = GOOD,
    per_node: int | None = None,
    far_load: float = 0.0,
    speeds_P: Amounts | None = None,
    adds_only: bool = False,
) -> Iterator[Placement]:
    """The placement, and then each better one: give the fullest ranks' hottest experts to the emptiest ranks, in the place of the copy that these use least, for at most
    `most_steps` changes of which each lowers the highest load, or how many ranks have it; while that is above `good` means.

    Ranks on nodes that hold the expert come first. One on another node must get at least `far_load` of it. A rank's load is over
    its speed, and the mean is the load of all over all speeds. With `adds_only` no copy is replaced.
    """
    speeds_P = np.ones(placement.num_ranks) if speeds_P is None else speeds_P
    mean = float(loads_E.sum() / speeds_P.sum())
    nodes = Nodes(num_ranks=placement.num_ranks, per_node=per_node or placement.num_ranks)
    score, amounts_H, loads_P = _score(loads_E, placement, speeds_P, mean)
    yield placement
    for _ in range(most_steps):
        if loads_P.max() <= good * mean:
            break
        changes = _changes(placement, amounts_H, loads_P, most_copies, nodes, adds_only)
        for copy, changed in changes:
            found = _score(loads_E, changed, speeds_P, mean)
            if found[0] < score and _amount(copy, changed, found[1]) >= far_load * copy.is_far:
                (score, amounts_H, loads_P), placement = found, changed
                break
        else:
            break
        yield placement


def _score(
    loads_E: Amounts, placement: Placement, speeds_P: Amounts, mean: float
) -> tuple[tuple[float, float], Amounts, Amounts]:
    amounts_H, loads_P = expected_loads(loads_E, placement, speeds_P=speeds_P)
    scale = max(mean, 1e-30)
    most = round(float(loads_P.max()) / scale, 6)
    return (most, round(float(np.square(loads_P / scale).sum()), 6)), amounts_H, loads_P


class _Copy(NamedTuple):
    """That is tried."""

    expert: int
    rank: int
    is_far: bool
    """On a node that has not held the expert."""


def _amount(copy: _Copy, placement: Placement, amounts_H: Amounts) -> float:
    of = placement.pairs.of(copy.expert)
    return float(amounts_H[of][placement.pairs.rank_H[of] == copy.rank].sum())


def _changes(
    placement: Placement,
    amounts_H: Amounts,
    loads_P: Amounts,
    most_copies: int,
    nodes: Nodes,
    adds_only: bool,
) -> Iterator[tuple[_Copy, Placement]]:
    """One copy more, or one in the place of another."""
    pairs, used_P = placement.pairs, (placement.copies_PC >= 0).sum(1)
    is_full_P = loads_P >= loads_P.max() * (1 - 1e-3)
    on_full_E = np.bincount(
        pairs.expert_H, amounts_H * is_full_P[pairs.rank_H], placement.num_experts
    )
    hottest = [e for e in np.argsort(-on_full_E, kind="stable")[:TRIED_EXPERTS] if on_full_E[e] > 0]
    by_load = [r for r in np.argsort(loads_P, kind="stable").tolist() if not is_full_P[r]]
    holders_EP = placement.holders_EP()
    for expert in hottest:
        is_near_P = np.isin(nodes.node_P, nodes.node_P[holders_EP[expert]])
        near = [r for r in by_load if is_near_P[r]][:TRIED_NEAR]
        for rank in near + [r for r in by_load[:TRIED_RANKS] if r not in near]:
            if holders_EP[expert, rank]:
                continue
            copy = _Copy(expert, rank, not is_near_P[rank])
            if used_P[rank] < most_copies:
                yield copy, _with_copy(placement, rank, int(used_P[rank]), expert)
                continue
            for column in () if adds_only else range(most_copies):
                yield copy, _with_copy(placement, rank, column, expert)


def _with_copy(placement: Placement, rank: int, column: int, expert: int) -> Placement:
    missing = max(0, column + 1 - placement.copies_PC.shape[1])
    copies_PC: Integers = np.pad(placement.copies_PC, ((0, 0), (0, missing)), constant_values=-1)
    copies_PC[rank, column] = expert
    return placement_of(placement.owner_E, copies_PC)
