"""Who serves how many of an expert's rows: every row once, as level as can be, as near as that allows.

Shapes: E experts, P ranks, N nodes, H pairs of an expert and a rank that holds it.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesys.plan.placement import Placement, owners_alone
from moesys.plan.placement_optimum import least_maximum
from moesys.plan.shares import Nodes, Shares, levelled, near_first, poured_over, whole
from tests.plan.placements import random_loads, random_placement, seeds

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(0, 4), st.integers(1, 4))
"""Experts, ranks, copies, ranks of a node."""


def flows(shares: Shares) -> NDArray[np.int64]:
    """[P, H], one row after the other: first on its own rank, then on its node, then wherever there is a place left."""
    counts_PE, left_H = shares.counts_PE.copy(), shares.quotas_H.copy()
    node_P = shares.nodes.node_P
    rows_PH = np.zeros((len(counts_PE), len(left_H)), dtype=np.int64)
    reaches = (
        lambda source, rank: source == rank,
        lambda source, rank: node_P[source] == node_P[rank],
        lambda source, rank: True,
    )
    for may in reaches:
        for source in range(len(counts_PE)):
            for h, (expert, rank) in enumerate(
                zip(shares.pairs.expert_H, shares.pairs.rank_H, strict=True)
            ):
                moved = min(counts_PE[source, expert], left_H[h]) if may(source, rank) else 0
                rows_PH[source, h] += moved
                counts_PE[source, expert] -= moved
                left_H[h] -= moved
    assert not counts_PE.any()
    return rows_PH


@settings(deadline=None, max_examples=300)
@given(seeds(), SIZES)
def test_rows_go_as_one_after_the_other_would(rng, sizes):
    experts, ranks, copies, per_node = sizes
    placement = random_placement(rng, experts, ranks, copies)
    counts_PE = random_loads(rng, ranks, experts)
    shares = Shares.of(counts_PE, placement, per_node)
    pairs, nodes = shares.pairs, shares.nodes
    assert (shares.quotas_H >= 0).all()
    totals_E = np.bincount(pairs.expert_H, shares.quotas_H, experts)
    assert totals_E.tolist() == counts_PE.sum(0).tolist()

    rows_PH = flows(shares)
    for rank in range(ranks):
        assert shares.sent_H(rank).tolist() == rows_PH[rank].tolist()
        mine = np.flatnonzero(pairs.rank_H == rank)
        assert shares.received_PI(mine).tolist() == rows_PH[:, mine].tolist()
    loads_P = np.bincount(pairs.rank_H, rows_PH.sum(0), ranks)
    assert shares.loads_P().tolist() == loads_P.tolist()

    away_PH = np.where(nodes.node_P[:, None] != nodes.node_P[pairs.rank_H], rows_PH, 0)
    here_N = np.bincount(nodes.node_P[pairs.rank_H], away_PH.sum(0), nodes.number)
    there_N = nodes.sums(away_PH).sum(1)
    assert shares.crossing_N2().tolist() == np.stack([there_N, here_N], 1).astype(int).tolist()


@settings(deadline=None, max_examples=300)
@given(seeds(), SIZES)
def test_no_rank_has_much_more_than_the_least_maximum(rng, sizes):
    experts, ranks, copies, per_node = sizes
    placement = random_placement(rng, experts, ranks, copies)
    counts_PE = random_loads(rng, ranks, experts)
    shares = Shares.of(counts_PE, placement, per_node)
    least = least_maximum(counts_PE.sum(0).astype(float), placement)
    # Each of a rank's experts may be rounded up by one row.
    assert shares.loads_P().max() <= 1.03 * least + placement.places_per_rank


def test_without_copies_every_row_goes_to_the_owner():
    counts_PE = np.array([[3, 0, 5, 1], [2, 2, 2, 2]])
    shares = Shares.of(counts_PE, owners_alone(np.array([0, 0, 1, 1]), 2), per_node=1)
    assert shares.quotas_H.tolist() == [5, 2, 7, 3]
    assert shares.sent_H(0).tolist() == [3, 0, 5, 1]
    assert shares.received_PI(np.array([2, 3])).tolist() == [[5, 1], [2, 2]]
    assert shares.crossing_N2().tolist() == [[6, 4], [4, 6]]


def test_rows_stay_on_their_rank_then_on_their_node():
    """Expert 0 of rank 0 has a copy on rank 2, of the other node of two; each rank has 10 rows of it."""
    placement = Placement(
        owner_E=np.array([0, 1, 2, 3]), copies_PC=np.array([[-1], [-1], [0], [-1]])
    )
    counts_PE = np.zeros((4, 4), dtype=np.int64)
    counts_PE[:, 0] = 10
    nodes = Nodes(num_ranks=4, per_node=2)
    pairs = placement.pairs
    assert near_first(counts_PE, pairs, nodes).tolist() == [20, 20, 0, 0, 0]
    shares = Shares.of(counts_PE, placement, per_node=2)
    assert [shares.sent_H(rank).tolist() for rank in range(4)] == [
        [10, 0, 0, 0, 0],
        [10, 0, 0, 0, 0],
        [0, 10, 0, 0, 0],
        [0, 10, 0, 0, 0],
    ]
    assert not shares.crossing_N2().any()


def test_faster_ranks_serve_more():
    placement = Placement(owner_E=np.array([0]), copies_PC=np.array([[-1], [0]]))
    counts_PE = np.array([[150], [150]])
    shares = Shares.of(counts_PE, placement, per_node=1, speeds_P=np.array([1.0, 2.0]))
    assert shares.loads_P()[1] == pytest.approx(200, abs=5)


def test_a_chain_of_copies_is_levelled_to_its_end():
    """Each rank has a copy of what the one before it owns, and rank 0 owns all the load."""
    ranks = 6
    placement = Placement(owner_E=np.arange(ranks), copies_PC=(np.arange(ranks) - 1)[:, None])
    counts_PE = np.zeros((ranks, ranks), dtype=np.int64)
    counts_PE[0] = [600, 300, 0, 0, 0, 0]
    loads_P = Shares.of(counts_PE, placement, per_node=1).loads_P()
    assert loads_P.max() <= 1.03 * 300
    assert loads_P[3:].sum() == 0


def test_water_stands_level():
    poured = poured_over(np.array([5.0, 1.0, 3.0]), 4.0, np.ones(3))
    assert poured.tolist() == [0.0, 3.0, 1.0]
    assert poured_over(np.array([2.0, 0.0]), 1.0, np.ones(2)).tolist() == [0.0, 1.0]
    assert poured_over(np.array([0.0, 0.0]), 0.0, np.ones(2)).tolist() == [0.0, 0.0]


def test_whole_rows_have_the_totals():
    placement = Placement(owner_E=np.array([0, 1]), copies_PC=np.array([[1], [0]]))
    rows = whole(np.array([1.5, 2.5, 0.4, 0.6]), np.array([4, 1]), placement.pairs)
    assert rows.reshape(2, 2).sum(1).tolist() == [4, 1]
    assert np.abs(rows - [1.5, 2.5, 0.4, 0.6]).max() < 1


def test_levelling_leaves_what_no_one_else_holds():
    placement = owners_alone(np.array([0, 1]), 2)
    assert levelled(np.array([9.0, 1.0]), placement.pairs, 2).tolist() == [9.0, 1.0]
