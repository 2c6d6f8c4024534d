"""Rows of a routing, by hand."""

from moesys.plan.rows import RowsSent, Ways, rows_sent, rows_sent_once


def test_rank_to_rank():
    """Two ep ranks of two experts each, two slices of each expert."""
    slots = [[[1, 2, 3, 4], [5, 0, 0, 1]], [[0, 7, 1, 1], [2, 2, 2, 2]]]
    assert rows_sent(slots, 0, 0) == RowsSent(
        ep=Ways(there=3 + 4, back=0 + 7),
        copied=(1 + 2) + (0 + 7),
        partial=(5 + 0) + (2 + 2),
    )
    assert rows_sent([[[1, 2, 3, 4]]], 0, 0) == RowsSent()
    # Of two widths: experts 0 and 2 are the first rank's, 1 and 3 the second's.
    assert rows_sent(slots, 0, 0, num_classes=2) == RowsSent(
        ep=Ways(there=2 + 4, back=0 + 1),
        copied=(1 + 3) + (0 + 1),
        partial=(5 + 0) + (2 + 2),
    )


FOUR = [[[1, 20, 300, 4000]], [[2, 30, 400, 5000]], [[3, 40, 500, 6000]], [[4, 50, 600, 7000]]]
"""Four ranks of an expert each, two on a node."""


def test_in_two_steps():
    # Rank 0: to its neighbour what that keeps and what it takes to the other node's second rank.
    assert rows_sent(FOUR, 0, 0, per_node=2) == RowsSent(
        inside=Ways(there=20 + 4000, back=2 + 400), across=Ways(there=300 + 400, back=3 + 4)
    )
    assert rows_sent(FOUR, 3, 0, per_node=2) == RowsSent(
        inside=Ways(there=500 * 0 + 4 + 600, back=40 + 6000),
        across=Ways(there=40 + 50, back=4000 + 5000),
    )
    on_one_node = rows_sent(FOUR, 1, 0, per_node=4)
    assert on_one_node.inside == rows_sent(FOUR, 1, 0).ep
    assert on_one_node.across == Ways()
    alone = rows_sent(FOUR, 1, 0, per_node=1)
    assert alone.across == rows_sent(FOUR, 1, 0).ep
    assert alone.inside == Ways()


def test_once_for_a_node():
    ids = [[[[0, 1], [2, 3], [0, 2]]], [[[3, 2]]], [[[0, 1], [1, -1]]], [[[-1, -1]]]]
    slots = [[[2, 1, 2, 1]], [[0, 0, 1, 1]], [[1, 2, 0, 0]], [[0, 0, 0, 0]]]
    found = [rows_sent_once(ids, slots, rank, 0, 1, 2) for rank in range(4)]
    # Of rank 0's tokens two have experts on the other node; its neighbour's one comes and goes by its own rail.
    assert [f.across for f in found] == [Ways(2, 2), Ways(1, 0), Ways(2, 2), Ways(0, 1)]
    # Rank 0 has its own rows and rank 2's for its neighbour; rank 2 has rank 0's for rank 3.
    assert [f.inside.there for f in found] == [1 + 2, 0, 1, 1]
    assert [f.inside.back for f in found] == [0, 1 + 2, 1, 1]
