"""Which holder serves how much of an expert's load, and which rank sends its rows to whom. Pure.

Shapes: E experts, P ranks (those of a node one after another), N nodes, H pairs of an expert and a rank that holds it,
R experts that several ranks hold.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from moesys.plan.lines import begins
from moesys.plan.placement import Amounts, Integers, Nodes, Pairs, Placement

SLACK = 0.02
"""A rank may have so much more than the least possible maximum, for rows that then need not travel."""
MOST_SWEEPS = 32


def near_first(counts_PE: NDArray, pairs: Pairs, nodes: Nodes) -> Amounts:
    """fp64 [H]: rows stay on their rank if it holds the expert, else go to holders on its node evenly, else to all evenly
    (Hecate, 2502.02581, section 4.4). `counts_PE`: each rank's rows."""
    counts_PE = counts_PE.astype(np.float64)
    expert_H, rank_H = pairs.expert_H, pairs.rank_H
    node_H = nodes.node_P[rank_H]
    own_H = counts_PE[rank_H, expert_H]
    shape = nodes.number, counts_PE.shape[1]
    holders_NE, held_NE = np.zeros(shape), np.zeros(shape)
    np.add.at(holders_NE, (node_H, expert_H), 1.0)
    np.add.at(held_NE, (node_H, expert_H), own_H)
    left_NE = nodes.sums(counts_PE) - held_NE
    near_H = left_NE[node_H, expert_H] / holders_NE[node_H, expert_H]
    far_E = np.where(holders_NE == 0, left_NE, 0.0).sum(0)
    return own_H + near_H + (far_E / np.diff(pairs.start_X))[expert_H]


def relieved(
    amounts_H: Amounts, pairs: Pairs, num_ranks: int, speeds_P: Amounts | None = None
) -> Amounts:
    """Move amounts between an expert's holders until no rank has more than it must, beyond SLACK, and no more than that asks.

    Ranks above the mean give to those below it; where that does not help, for loads hang together in chains, `levelled` is
    what is left. A rank's load is its amounts over its speed.
    """
    speeds_P = np.ones(num_ranks) if speeds_P is None else speeds_P
    amounts_H, by_total = amounts_H.copy(), _hottest_shared(amounts_H, pairs)
    loads_P = pairs.loads(amounts_H, num_ranks)
    is_alone_H = (np.diff(pairs.start_X) == 1)[pairs.expert_H]
    alone_P = pairs.loads(amounts_H * is_alone_H, num_ranks)
    least = max(loads_P.sum() / speeds_P.sum(), float((alone_P / speeds_P).max()))
    cap_P = least * (1 + SLACK) * speeds_P
    for _ in range(MOST_SWEEPS):
        moved = sum(_give(amounts_H, loads_P, cap_P, pairs, expert) for expert in by_total)
        if moved <= 1e-9 * loads_P.sum():
            break
    if (loads_P <= cap_P * (1 + 1e-9)).all():
        return amounts_H
    return levelled(amounts_H, pairs, num_ranks, speeds_P)


def levelled(
    amounts_H: Amounts,
    pairs: Pairs,
    num_ranks: int,
    speeds_P: Amounts | None = None,
    sweeps: int = MOST_SWEEPS,
) -> Amounts:
    """The least maximum of the ranks' loads: each expert's holders are levelled, one expert after the other, until the sum of
    squares falls no more, or so many times."""
    speeds_P = np.ones(num_ranks) if speeds_P is None else speeds_P
    amounts_H, by_total = amounts_H.copy(), _hottest_shared(amounts_H, pairs)
    loads_P = pairs.loads(amounts_H, num_ranks)
    before = np.inf
    for _ in range(sweeps):
        for expert in by_total:
            _level(amounts_H, loads_P, speeds_P, pairs, expert)
        squares = float((np.square(loads_P) / speeds_P).sum())
        if squares >= before * (1 - 1e-5):
            break
        before = squares
    return amounts_H


def _hottest_shared(amounts_H: Amounts, pairs: Pairs) -> list[int]:
    """Experts that several ranks hold, those with the most first."""
    totals_E = np.bincount(pairs.expert_H, amounts_H, len(pairs.start_X) - 1)
    shared = pairs.shared
    return shared[np.argsort(-totals_E[shared], kind="stable")].tolist()


def _give(amounts_H: Amounts, loads_P: Amounts, cap_P: Amounts, pairs: Pairs, expert: int) -> float:
    """From an expert's holders that are above their caps to those below; in place. Returns how much."""
    of, ranks = pairs.of(expert), pairs.rank_H[pairs.of(expert)]
    spare = cap_P[ranks] - loads_P[ranks]
    over = np.minimum(np.maximum(-spare, 0.0), amounts_H[of])
    room = np.maximum(spare, 0.0)
    moved = min(over.sum(), room.sum())
    if moved <= 0:
        return 0.0
    change = room * (moved / room.sum()) - over * (moved / over.sum())
    amounts_H[of] += change
    loads_P[ranks] += change
    return float(moved)


def _level(
    amounts_H: Amounts, loads_P: Amounts, speeds_P: Amounts, pairs: Pairs, expert: int
) -> None:
    """Pour an expert's whole amount over its holders as water over steps of their other amounts; in place."""
    of, ranks = pairs.of(expert), pairs.rank_H[pairs.of(expert)]
    others, speeds = loads_P[ranks] - amounts_H[of], speeds_P[ranks]
    poured = poured_over(others, float(amounts_H[of].sum()), speeds)
    loads_P[ranks] = others + poured
    amounts_H[of] = poured


def poured_over(others: Amounts, total: float, speeds: Amounts) -> Amounts:
    """Amounts, `total` together, that make the least of (others + amounts) / speeds as high as it can be."""
    heights = others / speeds
    order = np.argsort(heights, kind="stable")
    wide, filled = np.cumsum(speeds[order]), np.cumsum(others[order])
    levels = (total + filled) / wide
    # The water stands over the first k steps: above the k-th, not above the next.
    reached = int(np.flatnonzero(levels > heights[order])[-1]) if total > 0 else 0
    return (
        np.maximum(levels[reached] * speeds - others, 0.0) if total > 0 else np.zeros_like(others)
    )


def whole(amounts_H: Amounts, totals_E: Integers, pairs: Pairs) -> Integers:
    """Integers near the amounts, each expert's with its total: rounded down, and what is left to the largest remainders."""
    down_H = np.floor(amounts_H).astype(np.int64)
    left_E = totals_E - np.add.reduceat(down_H, pairs.start_X[:-1])
    by_rest_H = np.lexsort((down_H - amounts_H, pairs.expert_H))
    place_H = np.empty_like(down_H)
    place_H[by_rest_H] = np.arange(len(down_H)) - pairs.start_X[pairs.expert_H[by_rest_H]]
    number_H = np.diff(pairs.start_X)[pairs.expert_H]
    left_H = left_E[pairs.expert_H]
    # Of a left above the number of holders, or below 0, each gets its even part first.
    return down_H + left_H // number_H + (place_H < left_H % number_H)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """How many rows each holder of each expert gets, in all."""

    counts_PE: Integers
    """Rows of each rank."""
    quotas_H: Integers
    pairs: Pairs
    nodes: Nodes

    @classmethod
    def of(
        cls,
        counts_PE: Integers,
        placement: Placement,
        per_node: int,
        speeds_P: Amounts | None = None,
    ) -> Self:
        nodes = Nodes(num_ranks=placement.num_ranks, per_node=per_node)
        pairs = placement.pairs
        if not len(pairs.shared):
            return cls(counts_PE=counts_PE, quotas_H=counts_PE.sum(0), pairs=pairs, nodes=nodes)
        amounts_H = relieved(
            near_first(counts_PE, pairs, nodes), pairs, placement.num_ranks, speeds_P
        )
        return cls(
            counts_PE=counts_PE,
            quotas_H=whole(amounts_H, counts_PE.sum(0), pairs),
            pairs=pairs,
            nodes=nodes,
        )

    def loads_P(self) -> Integers:
        """Rows that each rank's experts get."""
        return self.pairs.loads(self.quotas_H, self.nodes.num_ranks).astype(np.int64)

    def sent_P(self, rank: int) -> Integers:
        """Rows of this rank for each rank."""
        return self.pairs.loads(self.sent_H(rank), self.nodes.num_ranks).astype(np.int64)

    def sent_H(self, rank: int) -> Integers:
        """Rows of this rank for each pair."""
        return self._rows(np.array([rank]), np.arange(len(self.quotas_H)))[0]

    def received_PI(self, pairs_I: Integers) -> Integers:
        """Rows of every rank for these pairs."""
        return self._rows(np.arange(self.nodes.num_ranks), pairs_I)

    def crossing_N2(self) -> Integers:
        """Rows that leave each node, and that come to it."""
        lines = self._lines
        node_H = self.nodes.node_P[self.pairs.rank_H]
        there_N = self.nodes.sums(lines.far_supply_PE).sum(1)
        here_N = np.zeros_like(there_N)
        np.add.at(here_N, node_H, lines.far_demand_H)
        return np.stack([there_N, here_N], axis=1)

    @cached_property
    def _lines(self) -> "_Lines":
        return _Lines.of(self.counts_PE, self.quotas_H, self.pairs, self.nodes)

    def _rows(self, sources_S: Integers, pairs_I: Integers) -> Integers:
        """[S, I]: what stays on a rank, what its node serves, and the rest."""
        if not len(self.pairs.shared):  # owners alone get all that there is
            return self.counts_PE[np.ix_(sources_S, self.pairs.expert_H[pairs_I])]
        lines, node_P = self._lines, self.nodes.node_P
        expert_I, rank_I = self.pairs.expert_H[pairs_I], self.pairs.rank_H[pairs_I]
        at = np.ix_(sources_S, expert_I)
        node_I = node_P[rank_I]
        most_I = lines.near_NE[node_I, expert_I]
        near_SI = _overlaps(
            np.minimum(lines.near_start_PE[at], most_I),
            np.minimum(lines.near_start_PE[at] + lines.supply_PE[at], most_I),
            np.minimum(lines.near_start_H[pairs_I], most_I),
            np.minimum(lines.near_start_H[pairs_I] + lines.demand_H[pairs_I], most_I),
        )
        far_SI = _overlaps(
            lines.far_start_PE[at],
            lines.far_start_PE[at] + lines.far_supply_PE[at],
            lines.far_start_H[pairs_I],
            lines.far_start_H[pairs_I] + lines.far_demand_H[pairs_I],
        )
        is_near_SI = node_P[sources_S][:, None] == node_I
        is_own_SI = sources_S[:, None] == rank_I
        return is_own_SI * lines.stay_H[pairs_I] + np.where(is_near_SI, near_SI, 0) + far_SI


@dataclass(frozen=True, kw_only=True, eq=False)
class _Lines:
    """For each expert what ranks have lies on a line, rank after rank, beside what its holders take: where two pieces lie
    beside each other, rows go. First on a line of each node, then what is left on one of all."""

    stay_H: Integers
    supply_PE: Integers
    demand_H: Integers
    near_start_PE: Integers
    near_start_H: Integers
    near_NE: Integers
    """How much of each node's line is served."""
    far_supply_PE: Integers
    far_demand_H: Integers
    far_start_PE: Integers
    far_start_H: Integers

    @classmethod
    def of(cls, counts_PE: Integers, quotas_H: Integers, pairs: Pairs, nodes: Nodes) -> Self:
        expert_H, rank_H = pairs.expert_H, pairs.rank_H
        node_P, node_H = nodes.node_P, nodes.node_P[rank_H]
        stay_H = np.minimum(counts_PE[rank_H, expert_H], quotas_H)
        supply_PE = counts_PE.copy()
        supply_PE[rank_H, expert_H] -= stay_H
        demand_H = quotas_H - stay_H
        before_PE = supply_PE.cumsum(0) - supply_PE
        near_start_PE = before_PE - before_PE[node_P * nodes.per_node]
        near_start_H = begins(demand_H, expert_H * nodes.number + node_H)
        demand_NE = np.zeros((nodes.number, counts_PE.shape[1]), dtype=np.int64)
        np.add.at(demand_NE, (node_H, expert_H), demand_H)
        near_NE = np.minimum(nodes.sums(supply_PE), demand_NE)
        far_supply_PE = supply_PE - np.clip(near_NE[node_P] - near_start_PE, 0, supply_PE)
        far_demand_H = demand_H - np.clip(near_NE[node_H, expert_H] - near_start_H, 0, demand_H)
        return cls(
            stay_H=stay_H,
            supply_PE=supply_PE,
            demand_H=demand_H,
            near_start_PE=near_start_PE,
            near_start_H=near_start_H,
            near_NE=near_NE,
            far_supply_PE=far_supply_PE,
            far_demand_H=far_demand_H,
            far_start_PE=far_supply_PE.cumsum(0) - far_supply_PE,
            far_start_H=begins(far_demand_H, expert_H),
        )


def _overlaps(
    starts_a: Integers, ends_a: Integers, starts_b: Integers, ends_b: Integers
) -> Integers:
    return np.maximum(np.minimum(ends_a, ends_b) - np.maximum(starts_a, starts_b), 0)
