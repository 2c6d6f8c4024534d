"""How each sequence of a batch may be cut: in rings of which sizes, and how long each takes. Pure.

Shapes: S sequences, K sizes of a ring.
"""

import math
from typing import NamedTuple

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.fit import check_fits, least_ranks
from moesys.plan.placement import Integers
from moesys.plan.zigzag import ring_tokens

DEAR = 2.0
"""A ring whose ranks together take so many times as long as the smallest ring's is made only where nothing else would do."""
FINE = 64
"""Sizes are all tried up to twice as many ranks as this, and one in so many of larger ones."""


class Ways(NamedTuple):
    """Of one sequence: the smallest ring that has memory for it first."""

    sizes: list[int]
    seconds: list[float]
    """Of each of the ranks; inf where one would not have memory."""
    tokens: list[int]
    """Of the rank with the most, or one more."""
    useful: int
    """So many of the sizes, the first, are not dear."""

    least_s: float
    """Of all."""
    quick_s: float
    """Of what is not dear."""

    def within(self, level_s: float, cut: float) -> range:
        """Those that are looked at: dear ones only if no other is under the level, and only those that take no more than this part
        of it, if there are any."""
        number = self.useful if self.quick_s <= level_s else len(self.sizes)
        most_s = cut * level_s
        short = (way for way in range(number) if self.seconds[way] <= most_s)
        return range(next(short, 0), number)


class Batch:
    """Sequences with tokens, and what they may be cut into."""

    def __init__(
        self, lengths_S: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts
    ) -> None:
        """Raises ValueError for a sequence that does not fit."""
        self.lengths: list[int] = lengths_S.tolist()
        self.num_ranks, self.capacity_tokens, self.costs = num_ranks, capacity_tokens, costs
        check_fits(self.lengths, num_ranks, capacity_tokens)
        by_length = np.argsort(-lengths_S, kind="stable")
        self.by_length: list[int] = by_length[lengths_S[by_length] > 0].tolist()
        """The longest first."""
        fits_S = lengths_S <= capacity_tokens
        self.alone_s: list[float] = np.where(fits_S, costs.rank_s(lengths_S, 1), np.inf).tolist()
        """Of each sequence on one rank; inf where that has no memory for it."""
        self._ways: dict[int, Ways] = {}
        self._ring_tokens: dict[tuple[int, int], list[int]] = {}
        self.areas_s = [self._area_s(sequence) for sequence in self.by_length]
        """Of each of `by_length`, seconds of all of its ranks together, of as few as have memory for it."""
        self.rest_s = np.cumsum(self.areas_s[::-1])[::-1].tolist()
        """Of each and those behind it, `areas_s`; and their tokens:"""
        self.rest_tokens = np.cumsum(lengths_S[self.by_length][::-1])[::-1].tolist()

    def ways(self, sequence: int) -> Ways:
        """Worked out once for each length."""
        length = self.lengths[sequence]
        if length not in self._ways:
            self._ways[length] = self._ways_of(length)
        return self._ways[length]

    def piece_s(self, sequence: int, size: int) -> float:
        """On each of so many ranks, one of its ways' sizes."""
        ways = self.ways(sequence)
        return ways.seconds[ways.sizes.index(size)]

    def ring_tokens(self, sequence: int, size: int) -> list[int]:
        """Of each rank of its ring, worked out once."""
        key = self.lengths[sequence], size
        if key not in self._ring_tokens:
            self._ring_tokens[key] = ring_tokens(*key).tolist()
        return self._ring_tokens[key]

    def _area_s(self, sequence: int) -> float:
        alone_s = self.alone_s[sequence]
        if alone_s < math.inf:
            return alone_s
        ways = self.ways(sequence)
        return ways.seconds[0] * ways.sizes[0]

    def _ways_of(self, length: int) -> Ways:
        least = least_ranks(length, self.capacity_tokens)
        sizes, most = [least], min(self.num_ranks, length)
        while (size := sizes[-1] + max(1, sizes[-1] // FINE)) <= most:
            sizes.append(size)
        if sizes[-1] < most:
            sizes.append(most)
        sizes_K = np.array(sizes)
        tokens_K = -(-length // (2 * sizes_K)) * 2
        tokens_K[0] = min(int(tokens_K[0]), self.capacity_tokens) if least > 1 else length
        fits_K = tokens_K <= self.capacity_tokens
        seconds_K = np.where(fits_K, self.costs.rank_s(length, sizes_K), np.inf)
        area_K = seconds_K * sizes_K
        dear = np.flatnonzero(area_K > DEAR * area_K[0])
        useful = int(dear[0]) if len(dear) else len(sizes)
        seconds = seconds_K.tolist()
        return Ways(sizes, seconds, tokens_K.tolist(), useful, min(seconds), min(seconds[:useful]))
