"""What one rank has of a micro-step. Pure.

Shapes: T rows of the rank.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Self

import numpy as np

from moesys.plan.batch.plan import MicroStep, of_rank, tokens_of_ranks
from moesys.plan.placement import Integers
from moesys.plan.zigzag import local_chunks


@dataclass(frozen=True)
class LocalPiece:
    """Of one sequence."""

    length: int
    """Of the whole sequence, in tokens."""
    ranks: tuple[int, ...]
    """That share it, in the order of their ring."""
    rank: int
    """This rank's place among them."""

    @property
    def chunks(self) -> tuple[range, range]:
        """Its positions: early ones, and late ones behind them."""
        return local_chunks(self.length, self.rank, len(self.ranks))

    @property
    def num_tokens(self) -> int:
        early, late = self.chunks
        return len(early) + len(late)


@dataclass(frozen=True, eq=False)
class LocalPieces:
    """One behind the other, in the order of `plan.of_rank`."""

    pieces: tuple[LocalPiece, ...]
    multiple_of: int = 1
    """Rows behind the tokens, which are of no sequence and count nowhere, fill them up to a multiple of this."""
    most_tokens: int = 0
    """Of any rank in this micro-step; 0 = no other has more than this one."""

    @classmethod
    def of_plan(cls, step: MicroStep, lengths_S: Integers, rank: int, multiple_of: int = 1) -> Self:
        """Of `rank`; a sequence shorter than its ring may leave it a piece without tokens."""
        num_ranks = 1 + max((max(piece.ranks) for piece in step), default=-1)
        return cls(
            tuple(
                LocalPiece(int(lengths_S[piece.sequence]), piece.ranks, piece.ranks.index(rank))
                for piece in of_rank(step, rank)
            ),
            multiple_of,
            int(tokens_of_ranks(step, lengths_S, num_ranks).max(initial=0)),
        )

    @cached_property
    def rows(self) -> list[slice]:
        """Where each piece's tokens are among the rank's."""
        ends = np.cumsum([0, *(piece.num_tokens for piece in self.pieces)]).tolist()
        return [slice(begin, end) for begin, end in pairwise(ends)]

    @property
    def num_tokens(self) -> int:
        return self.rows[-1].stop if self.rows else 0

    @property
    def num_rows(self) -> int:
        """T: of tokens, and behind them of none."""
        return self._filled(self.num_tokens)

    @property
    def most_rows(self) -> int:
        """T of the rank with the most."""
        return self._filled(max(self.num_tokens, self.most_tokens))

    def _filled(self, num_tokens: int) -> int:
        return -(-num_tokens // self.multiple_of) * self.multiple_of

    def positions_T(self) -> Integers:
        """int64: of each token in its own sequence; 0 of a row without."""
        positions_T, at = np.zeros(self.num_rows, dtype=np.int64), 0
        for chunk in (chunk for piece in self.pieces for chunk in piece.chunks):
            positions_T[at : at + len(chunk)] = chunk
            at += len(chunk)
        return positions_T

    def piece_ids_T(self) -> Integers:
        """int64: of which of the pieces each token is; -1 of a row without."""
        ids_T = np.full(self.num_rows, -1, dtype=np.int64)
        for index, rows in enumerate(self.rows):
            ids_T[rows] = index
        return ids_T
