"""Every allowed pair is computed once, by the rank that holds its query, and no other pair."""

import random
from itertools import pairwise

import pytest

from moesys.parallel.context import (
    check_documents,
    check_equal_chunks,
    document_ends,
    local_positions,
    ring_tiles,
)
from moesys.plan.zigzag import local_chunks


def test_a_rank_holds_an_early_and_a_late_chunk():
    assert [local_positions(8, rank, 2) for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert local_chunks(12, 1, 3) == (range(2, 4), range(8, 10))
    assert local_chunks(5, 1, 3) == (range(1), range(3, 4))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_positions_are_held_once(size):
    held = [p for rank in range(size) for p in local_positions(24, rank, size)]
    assert sorted(held) == list(range(24))


def test_a_length_that_does_not_cut_equally_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"30 tokens .* 2 \* 4 = 8, .*: 32"):
        check_equal_chunks(30, 4)
    check_equal_chunks(32, 4)


def _computed(seq_len, rank, size, ends, num_samples=1):
    """All pairs (sample, query position, key position) in the tiles of `rank`, in order."""
    rows = [local_positions(seq_len, r, size) for r in range(size)]
    pairs = []
    for source in range(size):
        for tile in ring_tiles(seq_len, rank, source, size, ends):
            queries, keys = rows[rank][tile.queries], rows[source][tile.keys]
            in_tile = [
                (i, j)
                for i in range(len(queries))
                for j in range(i + 1 if tile.is_causal else len(keys))
            ]
            assert tile.pairs == len(in_tile)
            pairs += [
                (sample, queries[i], keys[j])
                for sample in range(num_samples)[tile.samples]
                for i, j in in_tile
            ]
    return sorted(pairs)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_tiles_are_the_causal_pairs_in_equal_shares(size):
    per_rank = [_computed(24, rank, size, None) for rank in range(size)]
    assert {len(pairs) for pairs in per_rank} == {24 * 25 // 2 // size}
    assert sorted(pair for pairs in per_rank for pair in pairs) == [
        (0, query, key) for query in range(24) for key in range(query + 1)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seq_len", [0, 1, 2, 5, 23, 30])
@pytest.mark.parametrize("documents", [False, True])
def test_the_tiles_of_any_length_are_its_causal_pairs(seq_len, size, documents):
    ends = ((seq_len,),) if documents else None
    computed = [pair for rank in range(size) for pair in _computed(seq_len, rank, size, ends)]
    assert sorted(computed) == [
        (0, query, key) for query in range(seq_len) for key in range(query + 1)
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_every_step_but_the_first_is_equal_work(size):
    later = {
        sum(tile.pairs for tile in ring_tiles(64, rank, source, size))
        for rank in range(size)
        for source in range(size)
        if source != rank
    }
    assert later == {(64 // size) ** 2 // 2}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_tiles_of_documents_are_their_causal_pairs(size, seed):
    draw = random.Random(seed)
    ends = tuple((*sorted(draw.sample(range(1, 24), k=seed)), 24) for _ in range(2))
    expected = [
        (sample, query, key)
        for sample in range(2)
        for begin, end in pairwise((0, *ends[sample]))
        for query in range(begin, end)
        for key in range(begin, query + 1)
    ]
    computed = [
        pair for rank in range(size) for pair in _computed(24, rank, size, ends, num_samples=2)
    ]
    assert sorted(computed) == expected


def test_no_tile_is_without_pairs_and_a_chunk_pair_has_one_rectangle():
    """Documents as long as a chunk: nothing to compute with other chunks."""
    ends = (tuple(range(4, 33, 4)),)
    for rank in range(4):
        tiles = [ring_tiles(32, rank, source, 4, ends) for source in range(4)]
        assert [len(t) for t in tiles] == [2 if source == rank else 0 for source in range(4)]
    whole = ring_tiles(32, 2, 1, 4, ((32,),))
    assert [(t.queries, t.keys, t.is_causal) for t in whole] == [
        (slice(0, 4), slice(0, 4), False),
        (slice(4, 8), slice(0, 4), False),
    ]


def test_a_document_is_a_run_of_equal_ids():
    assert document_ends([[7, 7, 3, 7], [0, 0, 0, 0]]) == ((2, 3, 4), (4,))


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (((8,),), "1 samples were given for 2"),
        (((8,), (4, 7)), r"sample 1 .* length of the whole sequence, 8: .*\(4, 7\)"),
        (((5, 3, 8), (8,)), "sample 0 must rise|ends of sample 0"),
        (((8,), ()), "sample 1"),
    ],
)
def test_documents_that_do_not_fill_the_sequences_are_refused(ends, message):
    with pytest.raises(ValueError, match=message):
        check_documents(ends, 2, 8)


def test_documents_that_fill_the_sequences_pass():
    check_documents(((8,), (1, 7, 8)), 2, 8)
