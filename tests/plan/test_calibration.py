"""Copies that are added once true loads are known: where they pay, and as many as save the most.

Shapes: E experts, P ranks.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from numpy.typing import NDArray

import moesys.plan.calibration as calibration
from moesys.plan.calibration import Pace, calibrated
from moesys.plan.chunk_routes import ChunkRoute, chunk_route
from moesys.plan.links import Link, Links
from moesys.plan.placement import (
    Placement,
    even_owners,
    owners_alone,
    problems,
    with_more_copies,
)
from moesys.plan.shares import Shares
from tests.plan.placements import random_loads, random_placement, seeds

EXPERTS, RANKS, PER_NODE, COPIES, HOT = 16, 8, 2, 3, 5
PACE = Pace(
    row_s=1e-5,
    row_bytes=100.0,
    chunk_bytes=1e3,
    travels=2,
    micro_steps=1,
    links=Links(inside=Link(1e-5, 1e10), between=Link(1e-5, 1e8)),
)


def routed(placement: Placement) -> ChunkRoute:
    return chunk_route(placement, PER_NODE, "star")


def hot_PE(times: int = 6) -> NDArray[np.int64]:
    """Rows of which one expert has so many times the others'."""
    counts_PE = np.full((RANKS, EXPERTS), 100)
    counts_PE[:, HOT] *= times
    return counts_PE


def found(
    counts_PE: NDArray[np.int64], placement: Placement, pace: Pace, most_copies: int = COPIES
) -> Placement | None:
    """Of all copies."""
    added = calibrated(counts_PE, placement, most_copies, PER_NODE, pace, routed)
    if added is None:
        return None
    more, route = added
    assert route == routed(more)
    return with_more_copies(placement, more.copies_PC)


def rows_s(counts_PE: NDArray[np.int64], placement: Placement, pace: Pace) -> float:
    """Counted row by row."""
    shares = Shares.of(counts_PE, placement, PER_NODE)
    sent_PP = np.stack([shares.sent_P(rank) for rank in range(RANKS)])
    nodes = RANKS // PER_NODE
    of_nodes_NN = sent_PP.reshape(nodes, PER_NODE, nodes, PER_NODE).sum((1, 3))
    np.fill_diagonal(of_nodes_NN, 0)
    crossing = max(of_nodes_NN.sum(0).max(), of_nodes_NN.sum(1).max())
    assert pace.links.between is not None
    way_s = crossing * pace.row_bytes / pace.links.between.bytes_per_s
    return pace.micro_steps * (sent_PP.sum(0).max() * pace.row_s + way_s)


def added_to(placement: Placement, both: Placement) -> Placement:
    """The copies alone that are in one and not in the other."""
    holders_EP = both.holders_EP() & ~placement.holders_EP()
    copies_PC = np.full((RANKS, EXPERTS), -1)
    for rank, has_E in enumerate(holders_EP.T):
        copies_PC[rank, : has_E.sum()] = np.flatnonzero(has_E)
    return Placement(owner_E=placement.owner_E, copies_PC=copies_PC)


@given(seeds())
def test_they_are_new_within_the_budget_and_save_more_than_they_cost(
    rng: np.random.Generator,
) -> None:
    counts_PE = random_loads(rng, RANKS, EXPERTS)
    placement = random_placement(rng, EXPERTS, RANKS, COPIES - 1)
    pace = replace(PACE, chunk_bytes=10.0 ** rng.uniform(1, 6), micro_steps=int(rng.integers(1, 4)))
    both = found(counts_PE, placement, pace)
    assume(both is not None)
    assert both is not None
    assert not problems(both, COPIES)
    for rank in range(RANKS):
        held = placement.held(rank)
        assert both.held(rank)[: len(held)] == held, "what is there stays where it is"
    assert (both.copies_PC >= 0).sum() > (placement.copies_PC >= 0).sum()
    way_s = pace.travels * routed(added_to(placement, both)).seconds(pace.chunk_bytes, pace.links)
    saved_s = rows_s(counts_PE, placement, pace) - rows_s(counts_PE, both, pace)
    assert saved_s > way_s


def test_a_hotspot_is_levelled_by_as_few_copies_as_their_way_is_long() -> None:
    """None where one takes longer than it saves."""
    owners = owners_alone(even_owners(EXPERTS, RANKS), RANKS)
    numbers, over_mean = [], []
    for chunk_bytes in (1e2, 3e4, 1e5, 3e5, 1e9):
        both = found(hot_PE(), owners, replace(PACE, chunk_bytes=chunk_bytes)) or owners
        numbers.append(int((both.copies_PC >= 0).sum()))
        loads_P = Shares.of(hot_PE(), both, PER_NODE).loads_P()
        over_mean.append(loads_P.max() / loads_P.mean())
    assert over_mean[0] <= 1.05
    assert over_mean[-1] == pytest.approx(7 / 21 * 8)
    assert numbers[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(numbers))
    assert len(set(numbers)) >= 3


def test_micro_steps_that_are_routed_alike_pay_together() -> None:
    owners = owners_alone(even_owners(EXPERTS, RANKS), RANKS)
    dear = replace(PACE, chunk_bytes=1e9)
    assert found(hot_PE(), owners, dear) is None
    assert found(hot_PE(), owners, replace(dear, micro_steps=20)) is not None


def test_ranks_that_hold_all_that_they_may_get_no_more() -> None:
    placement = random_placement(np.random.default_rng(0), EXPERTS, RANKS, COPIES)
    full = int((placement.copies_PC >= 0).sum(1).min())
    both = found(hot_PE(50), placement, PACE, full)
    used_P = (placement.copies_PC >= 0).sum(1)
    if both is not None:
        assert ((both.copies_PC >= 0).sum(1)[used_P >= full] == used_P[used_P >= full]).all()
    assert found(hot_PE(), owners_alone(even_owners(EXPERTS, RANKS), RANKS), PACE, 0) is None


@pytest.mark.parametrize(
    ("counts_PE", "pace"),
    [
        (hot_PE(1), PACE),
        (hot_PE(), replace(PACE, row_s=1e-9)),
        (np.zeros((RANKS, EXPERTS), dtype=np.int64), PACE),
    ],
    ids=["level", "cheap rows", "no rows"],
)
def test_nothing_is_looked_for_where_nothing_can_be_saved(
    counts_PE: NDArray[np.int64], pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("planned in vain, while a layer waits")

    monkeypatch.setattr(calibration, "repairs", never)
    owners = owners_alone(even_owners(EXPERTS, RANKS), RANKS)
    assert calibrated(counts_PE, owners, COPIES, PER_NODE, pace, routed) is None


def test_a_slow_rank_is_relieved() -> None:
    """All experts have as many rows, and one rank takes four times as long for its."""
    owners = owners_alone(even_owners(EXPERTS, RANKS), RANKS)
    speeds_P = np.ones(RANKS)
    speeds_P[3] = 0.25
    assert calibrated(hot_PE(1), owners, COPIES, PER_NODE, PACE, routed) is None
    added = calibrated(hot_PE(1), owners, COPIES, PER_NODE, PACE, routed, speeds_P)
    assert added is not None
    more, _ = added
    assert {6, 7} <= {e for rank in range(RANKS) for e in more.copies(rank)}
    before, after = (
        (Shares.of(hot_PE(1), placed, PER_NODE, speeds_P).loads_P() / speeds_P).max()
        for placed in (owners, with_more_copies(owners, more.copies_PC))
    )
    assert after < before / 3
