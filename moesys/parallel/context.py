"""Who holds which positions of a sequence, and which pairs of them each rank computes. Integers only.

The sequence is cut in 2 * size chunks (plan/zigzag.py), and rank r holds chunks r and 2 * size - 1 - r, one behind the
other: an early one, which sees little, and a late one, which sees much, so that causal attention is as much work for
all ranks. What a rank computes is a list of tiles, rectangles of (query, key) pairs, each without a mask or with the
plain causal one; a document-causal mask is cut into such tiles exactly, so no mask is ever stored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, groupby, pairwise

from moesys.plan.zigzag import local_chunks

DocumentEnds = tuple[tuple[int, ...], ...]
"""For each sample, the position after the last token of each of its documents; the last is the sequence length."""


def check_equal_chunks(seq_len: int, size: int) -> None:
    """Raise ValueError when the sequence does not cut into 2 * size equal chunks."""
    if seq_len % (2 * size):
        raise ValueError(
            f"a sequence of {seq_len} tokens must be a multiple of 2 * {size} = {2 * size}, to be cut in two chunks "
            f"for each of {size} context ranks; the next that is: {seq_len + -seq_len % (2 * size)}"
        )


def local_positions(seq_len: int, rank: int, size: int) -> list[int]:
    """The positions of `rank`, in the order in which it holds them: an index into the sequence."""
    early, late = local_chunks(seq_len, rank, size)
    return [*early, *late]


def document_ends(document_ids_list: Sequence[Sequence[int]]) -> DocumentEnds:
    """From the document of each token, [samples][positions]: a document is a run of equal ids."""
    return tuple(
        tuple(accumulate(len(list(run)) for _, run in groupby(document_ids)))
        for document_ids in document_ids_list
    )


def check_documents(ends: DocumentEnds, num_samples: int, seq_len: int) -> None:
    """Raise ValueError unless every sample's documents fill the whole sequence, in order."""
    if len(ends) != num_samples:
        raise ValueError(f"documents of {len(ends)} samples were given for {num_samples} samples")
    for sample, sample_ends in enumerate(ends):
        if list(sample_ends) != sorted(sample_ends) or sample_ends[-1:] != (seq_len,):
            raise ValueError(
                f"the document ends of sample {sample} must rise to the length of the whole sequence, {seq_len}: "
                f"they are {sample_ends}"
            )


@dataclass(frozen=True, kw_only=True)
class Tile:
    """These queries see these keys: all of them, or, if `is_causal`, those up to their own number in the tile."""

    samples: slice
    queries: slice
    """Rows among those that the computing rank holds."""
    keys: slice
    """Rows among those that the source rank holds."""
    is_causal: bool

    @property
    def at_queries(self) -> tuple[slice, slice, slice]:
        """Indexes [B, heads, rows, ...] of the computing rank."""
        return self.samples, slice(None), self.queries

    @property
    def at_keys(self) -> tuple[slice, slice, slice]:
        """Indexes [B, heads, rows, ...] of the source rank."""
        return self.samples, slice(None), self.keys

    def behind(self, queries: int, keys: int) -> "Tile":
        """Of the same pairs, where so many other rows come before on either side."""
        return replace(
            self,
            queries=slice(self.queries.start + queries, self.queries.stop + queries),
            keys=slice(self.keys.start + keys, self.keys.stop + keys),
        )

    @property
    def pairs(self) -> int:
        """(query, key) pairs computed per sample and head."""
        num_queries = self.queries.stop - self.queries.start
        num_keys = self.keys.stop - self.keys.start
        return num_queries * (num_queries + 1) // 2 if self.is_causal else num_queries * num_keys


@lru_cache(maxsize=256)  # the layers of one step ask for the same
def ring_tiles(
    seq_len: int, rank: int, source: int, size: int, ends: DocumentEnds | None = None
) -> tuple[Tile, ...]:
    """The tiles of `rank`'s queries with `source`'s keys; together, over all sources, just the allowed pairs.

    Without documents there is one tile at most, of equal work for every source but the own where chunks are equal; a
    rank's pairs then sum up to seq_len * (seq_len + 1) / 2 / size. With documents the work of the ranks follows from where
    these lie.
    """
    if ends is not None:
        return tuple(_document_tiles(seq_len, rank, source, size, ends))
    early, late = (len(chunk) for chunk in local_chunks(seq_len, rank, size))
    its_early, its_late = (len(chunk) for chunk in local_chunks(seq_len, source, size))
    queries, keys = slice(0, early + late), slice(0, its_early + its_late)
    if source < rank:
        keys = slice(0, its_early)
    elif source > rank:
        queries = slice(early, early + late)
    if queries.start == queries.stop or keys.start == keys.stop:
        return ()
    return (Tile(samples=slice(None), queries=queries, keys=keys, is_causal=source == rank),)


def _document_tiles(
    seq_len: int, rank: int, source: int, size: int, ends: DocumentEnds
) -> Iterator[Tile]:
    """A chunk has a causal square per document with itself, and at most one rectangle with an earlier chunk."""
    query_chunks = local_chunks(seq_len, rank, size)
    key_chunks = local_chunks(seq_len, source, size)
    for sample, sample_ends in enumerate(ends):
        for begin, end in pairwise((0, *sample_ends)):
            for i, query_chunk in enumerate(query_chunks):
                for j, key_chunk in enumerate(key_chunks):
                    queries = _overlap(query_chunk, begin, end, i * len(query_chunks[0]))
                    keys = _overlap(key_chunk, begin, end, j * len(key_chunks[0]))
                    if queries and keys and key_chunk.start <= query_chunk.start:
                        yield Tile(
                            samples=slice(sample, sample + 1),
                            queries=queries,
                            keys=keys,
                            is_causal=key_chunk == query_chunk,
                        )


def _overlap(chunk: range, begin: int, end: int, first_row: int) -> slice | None:
    """The rows of positions begin..end in a chunk that is held from `first_row` on."""
    begin, end = max(begin, chunk.start), min(end, chunk.stop)
    shift = first_row - chunk.start
    return slice(begin + shift, end + shift) if begin < end else None
