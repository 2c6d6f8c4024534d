"""More copies for a step whose true loads are known, where they save more time than they take on their way (Hecate, 2502.02581,
section 4). Pure.

Shapes: E experts, P ranks (`per_node` of each node one after another), C copies that a rank may hold.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesys.plan.chunk_routes import ChunkRoute
from moesys.plan.links import Links
from moesys.plan.placement import Amounts, Integers, Placement
from moesys.plan.repair import GOOD, repairs
from moesys.plan.shares import Shares

MOST_ADDED = 16
"""Copies that are tried, one after the other, each with those before it."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long it takes what a step consists of."""

    row_s: float
    """Of an expert for a row, forward and backward, on a rank of mean speed."""
    row_bytes: float
    """Of a row on another node, all its ways; 0 = not known."""
    chunk_bytes: float
    """Of an expert, or its gradient, on its way."""
    travels: int
    """Of either, in a step."""
    micro_steps: int
    """In a step, whose routing is taken to be like that of the first."""
    links: Links

    def rows_s(self, shares: Shares, speeds_P: Amounts) -> float:
        """Of all micro-steps: rows of the busiest rank, and those through the busiest uplink."""
        each_s = float((shares.loads_P() / speeds_P).max()) * self.row_s
        if self.row_bytes and self.links.between is not None:
            crossing_bytes = int(shares.crossing_N2().max()) * self.row_bytes
            each_s += crossing_bytes / self.links.between.bytes_per_s
        return self.micro_steps * each_s

    def copies_s(self, route: ChunkRoute) -> float:
        """Of all their travels."""
        return self.travels * route.seconds(self.chunk_bytes, self.links)

    @property
    def one_copy_s(self) -> float:
        """At least, by the quicker link."""
        return self.travels * min(
            link.seconds(self.chunk_bytes) for link in self.links if link is not None
        )


def calibrated(
    counts_PE: Integers,
    placement: Placement,
    most_copies: int,
    per_node: int,
    pace: Pace,
    routed: Callable[[Placement], ChunkRoute],
    speeds_P: Amounts | None = None,
    good: float = GOOD,
) -> tuple[Placement, ChunkRoute] | None:
    """Copies beside those of `placement`, on ranks that hold fewer than `most_copies`, and their route; None if none pays.

    They are added one by one, of the fullest ranks' hottest experts on the emptiest ranks, while the highest load falls and is
    above `good` means. As many of them are made as save the most time: of the rows, shared out as they will be, less that of
    their own way, which nothing hides.

    Args:
        counts_PE: rows of each rank in the first micro-step.
    """
    speeds_P = np.ones(placement.num_ranks) if speeds_P is None else speeds_P
    shares = Shares.of(counts_PE, placement, per_node, speeds_P)
    mean = counts_PE.sum() / speeds_P.sum()
    over = float((shares.loads_P() / speeds_P).max()) - mean
    if over <= (good - 1) * mean or pace.micro_steps * over * pace.row_s <= pace.one_copy_s:
        return None
    planned_s, most_saved_s, best = pace.rows_s(shares, speeds_P), 0.0, None
    loads_E = counts_PE.sum(0).astype(np.float64)
    limits = most_copies, MOST_ADDED, good, per_node, 0.0, speeds_P
    _, *others = repairs(loads_E, placement, *limits, adds_only=True)
    for placed in others:
        more = Placement(owner_E=placement.owner_E, copies_PC=_added_PC(placement, placed))
        route = routed(more)
        rows_s = pace.rows_s(Shares.of(counts_PE, placed, per_node, speeds_P), speeds_P)
        saved_s = planned_s - rows_s - pace.copies_s(route)
        if saved_s > most_saved_s:
            most_saved_s, best = saved_s, (more, route)
    return best


def _added_PC(before: Placement, after: Placement) -> Integers:
    """Copies that each rank has more."""
    is_new_PE: NDArray[np.bool_] = (after.holders_EP() & ~before.holders_EP()).T
    added_PC = np.full((after.num_ranks, max(1, int(is_new_PE.sum(1).max()))), -1)
    rank_X, expert_X = np.nonzero(is_new_PE)
    added_PC[rank_X, np.arange(len(rank_X)) - np.searchsorted(rank_X, rank_X)] = expert_X
    return added_PC
