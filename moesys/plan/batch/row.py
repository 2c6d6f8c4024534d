"""Ranks of a micro-step as they fill up to a level. Pure.

Shapes: R ranks, L of a ring, W windows of as many ranks.
"""

import heapq
import math
from bisect import bisect_right, insort
from typing import NamedTuple

import numpy as np

from moesys.plan.batch.plan import Piece
from moesys.plan.batch.ways import Batch, Ways
from moesys.plan.placement import Amounts

MOST_TRIED = 8
"""Sizes of a ring, one after the other, for which there are ranks that end below the level."""
MOST_LOOKED_AT = 32
"""Sizes, where memory is short."""
FEW = 32
"""Ranks that are put in order one by one."""
LONG = 0.01
"""Of a ring's work, that its ranks wait for the last of them together."""


class Ring(NamedTuple):
    way: int
    ranks: list[int]
    """Ascending."""
    first: int | None = None
    """Of these in the order of what ranks have, if they are next to each other there."""


class Row:
    """All ranks in a micro-step; or in all micro-steps, if memory is left out of it.

    Sequences come in order of their lengths, the longest first: a rank that has no room for one is out of the way until there
    comes one that it has room for.
    """

    def __init__(self, batch: Batch, level_s: float, *, waits: bool) -> None:
        """With `waits` ranks do for the others of a ring, and memory is left out of it."""
        num_ranks = batch.num_ranks
        capacity_tokens = sum(batch.lengths) if waits else batch.capacity_tokens
        self.level_s = level_s
        self.pieces: list[Piece] = []
        self.least_busy_s = 0.0
        """No rank with room for the last sequence has less."""
        self._batch, self._waits = batch, waits
        """For the last of its ring, before each piece: pieces begin and end together. Else ranks meet anyway."""
        self._busy = [0.0] * num_ranks
        self._room = [capacity_tokens] * num_ranks
        self._in = [(0.0, rank) for rank in range(num_ranks)]
        """Seconds of ranks that may have room, ascending."""
        self._out: list[tuple[int, int]] = []
        """A heap of ranks that had none, the most room first; some of it is outdated."""
        self._is_out = [False] * num_ranks

    @property
    def most_busy_s(self) -> float:
        return max(self._busy)

    def usable_s(self, token_s: float) -> float:
        """Of all ranks, to the level, with sequences that take so long for a token."""
        gaps_R = np.maximum(self.level_s - np.array(self._busy), 0.0)
        return float(
            (gaps_R if self._waits else np.minimum(gaps_R, token_s * np.array(self._room))).sum()
        )

    def take(self, sequence: int, length: int, seconds: float, *, over: bool = False) -> bool:
        """On the rank that has the least of those with room; only if that ends below the level, or may raise it."""
        while self._out and -self._out[0][0] >= length:
            room, rank = heapq.heappop(self._out)
            if self._is_out[rank] and -room == self._room[rank]:
                self._is_out[rank] = False
                insort(self._in, (self._busy[rank], rank))
        while self._in and self._room[self._in[0][1]] < length:
            rank = self._in.pop(0)[1]
            self._is_out[rank] = True
            heapq.heappush(self._out, (-self._room[rank], rank))
        self.least_busy_s = self._in[0][0] if self._in else math.inf
        end_s = self.least_busy_s + seconds
        if not self._in or (end_s > self.level_s and not over):
            return False
        rank = self._in.pop(0)[1]
        self._busy[rank] = end_s
        self._room[rank] -= length
        insort(self._in, (end_s, rank))
        self.pieces.append(Piece(sequence, (rank,)))
        if end_s > self.level_s:
            self.level_s = end_s
        return True

    def ring_under(self, ways: Ways, looked_at: range) -> Ring | None:
        """Below the level: the smallest, or where ranks wait for each other one that takes its ranks little time together."""
        if self._waits:
            return self._ring_that_waits_least(ways, looked_at)
        for way in looked_at:
            size, tokens = ways.sizes[way], ways.tokens[way]
            if size <= len(self._in) and self._in[size - 1][0] + ways.seconds[way] <= self.level_s:
                ranks = [rank for _, rank in self._in[:size]]
                if all(self._room[rank] >= tokens for rank in ranks):
                    return Ring(way, sorted(ranks), 0)
        return self._ring_with_room(ways, looked_at[:MOST_LOOKED_AT]) if self._out else None

    def _ring_that_waits_least(self, ways: Ways, looked_at: range) -> Ring | None:
        least_s, least, tried = math.inf, None, 0
        for way in looked_at:
            size, seconds = ways.sizes[way], ways.seconds[way]
            if size > len(self._in) or tried == MOST_TRIED:
                break
            if self._in[size - 1][0] + seconds > self.level_s:
                continue
            tried += 1
            first, waited_s = 0, size * self._in[size - 1][0] - sum(at for at, _ in self._in[:size])
            if waited_s > LONG * size * seconds:
                first, waited_s = self._window(size, seconds)
            if waited_s + size * seconds < least_s:
                least_s, least = waited_s + size * seconds, (way, first)
            if waited_s <= LONG * size * seconds:
                break
        if least is None:
            return None
        way, first = least
        ranks = sorted(rank for _, rank in self._in[first : first + ways.sizes[way]])
        return Ring(way, ranks, first)

    def _window(self, size: int, seconds: float) -> tuple[int, float]:
        """Of as many ranks that have about as much, those that wait the least for the last and end below the level: the first of
        them, and how long they wait together."""
        number = max(size, bisect_right(self._in, (self.level_s - seconds, math.inf)))
        ends = np.cumsum([0.0, *(busy_s for busy_s, _ in self._in[:number])])
        last_W = np.diff(ends)[size - 1 :]
        waited_W = size * last_W - (ends[size:] - ends[:-size])
        first = int(waited_W.argmin())
        return first, float(waited_W[first])

    def _ring_with_room(self, ways: Ways, looked_at: range) -> Ring | None:
        """The smallest, also of ranks that have no room for all of the sequence."""
        busy_R, room_R = np.array(self._busy), np.array(self._room)
        for way in looked_at:
            fits_R = (busy_R + ways.seconds[way] <= self.level_s) & (room_R >= ways.tokens[way])
            if np.count_nonzero(fits_R) >= ways.sizes[way]:
                return Ring(way, _least(np.where(fits_R, busy_R, np.inf), ways.sizes[way]))
        return None

    def least_over(self, ways: Ways, looked_at: range) -> tuple[float, int]:
        """By how much the level must be raised for a ring, and its way; infinite if there is room for none."""
        busy_R, room_R = np.array(self._busy), np.array(self._room)
        at_K = np.array(looked_at)
        over_K = np.array(ways.seconds)[at_K] + np.sort(busy_R)[np.array(ways.sizes)[at_K] - 1]
        overs = []
        for way in sorted({looked_at[0], looked_at[int(over_K.argmin())], looked_at[-1]}):
            least_R = np.sort(np.where(room_R >= ways.tokens[way], busy_R, np.inf))
            end_s = float(least_R[ways.sizes[way] - 1]) + ways.seconds[way]
            overs.append((end_s - self.level_s, way))
        return min(overs)

    def share(self, sequence: int, length: int, ways: Ways, ring: Ring) -> None:
        """The level is raised if the ring goes over it."""
        way, ranks, first = ring
        self.pieces.append(Piece(sequence, tuple(ranks)))
        begin_s = max(self._busy[rank] for rank in ranks)
        if first is None:
            chosen = set(ranks)
            self._in = [held for held in self._in if held[1] not in chosen]
        else:
            del self._in[first : first + len(ranks)]
        for rank, tokens in zip(ranks, self._batch.ring_tokens(sequence, len(ranks)), strict=True):
            self._busy[rank] = (begin_s if self._waits else self._busy[rank]) + ways.seconds[way]
            self._room[rank] -= tokens
            if self._is_out[rank]:
                heapq.heappush(self._out, (-self._room[rank], rank))
            elif len(ranks) < FEW:
                insort(self._in, (self._busy[rank], rank))
            else:
                self._in.append((self._busy[rank], rank))
        if len(ranks) >= FEW:
            self._in.sort()
        self.least_busy_s = self._in[0][0] if self._in else math.inf
        self.level_s = max(self.level_s, begin_s + ways.seconds[way])

    def least_busy(self, ways: Ways, way: int) -> Ring:
        """Of ranks with room, of which there must be enough."""
        fits_R = np.array(self._room) >= ways.tokens[way]
        return Ring(way, _least(np.where(fits_R, np.array(self._busy), np.inf), ways.sizes[way]))


def _least(key_R: Amounts, number: int) -> list[int]:
    """Ascending ranks of the least of these; the first ranks of those with the same."""
    most = np.sort(key_R)[number - 1]
    below, same = np.flatnonzero(key_R < most), np.flatnonzero(key_R == most)
    return np.sort(np.concatenate([below, same[: number - len(below)]])).tolist()
