"""What is known of the tokens that a layer routes, besides their activations.

Shapes: T tokens on this rank, U = P * T tokens of the P ranks that share sequences, B sequences of S tokens or, in pieces, of any
length.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel.ring import Ring
from moesys.parallel.tensor import TensorParallel
from moesys.plan.batch.local import LocalPieces


class SequenceShare(NamedTuple):
    """Which of the tokens of its ranks' common sequences this rank has."""

    group: dist.ProcessGroup | None = None
    """The ranks that share sequences, or pieces of some; None = this rank alone has whole ones."""
    tp_rank: int = 0
    """This rank has the tp_rank-th of tp_size equal runs of tokens."""
    tp_size: int = 1
    data_group: dist.ProcessGroup | None = None
    """The ranks of which a plan says which have pieces of a sequence; None where sequences are of equal length."""

    @property
    def rank(self) -> int:
        """In the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """P."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def own_run(self, of_tokens: Tensor, num_tokens: int) -> Tensor:
        """Of what there is of all rows of its tp ranks, that of this rank's tokens; all of it where it has no other's."""
        if len(of_tokens) == num_tokens:
            return of_tokens
        first_row = self.tp_rank * (len(of_tokens) // self.tp_size)
        return of_tokens[first_row : first_row + num_tokens]


WHOLE_SEQUENCES = SequenceShare()


class Known(NamedTuple):
    """Of U tokens next to each other, what no activation says."""

    ids_U: Tensor | None = None
    """int64, the vocabulary's; None where a layer is called outside of a model."""
    places_U: Tensor | None = None
    """int64, the place of each among all tokens of an optimizer step; None outside of training."""
    pieces: LocalPieces | None = None
    """Of sequences, whose tokens these are, and behind them rows that are none; None = all are, of sequences of equal length."""

    def own_tokens(self, share: SequenceShare, num_rows: int) -> int:
        """T: of so many rows of this rank those that are tokens."""
        if self.pieces is None:
            return num_rows
        return min(max(0, self.pieces.num_tokens - share.tp_rank * num_rows), num_rows)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of one forward of a layer. A router whose forward has a parameter `tokens` is given it."""

    num_tokens: int
    """T."""
    seq_len: int | None
    """So many tokens in a row, of the ranks that share the same stretches of sequences, are one sequence's. None: sequences are of
    any length."""
    ids_T: Tensor | None = None
    """int64, the vocabulary's; None where the layer is called outside of a model."""
    places_T: Tensor | None = None
    """int64, the place of each among all tokens of an optimizer step; None outside of training."""
    share: SequenceShare = WHOLE_SEQUENCES
    pieces: LocalPieces | None = None
    """Of sequences of any length, one behind the other, which this rank has, together with those of the same data rank."""

    @property
    def most_tokens(self) -> int:
        """That any rank has in this forward, or a few more."""
        most_rows = None if self.pieces is None else self.pieces.most_rows
        return self.num_tokens if most_rows is None else most_rows // self.share.tp_size

    @property
    def num_sequences(self) -> int:
        """B, of which this rank has all tokens or some; of a piece it may have none."""
        if self.pieces is not None:
            return len(self.pieces.pieces)
        return self.num_tokens * self.share.tp_size // self._equal_length

    def sequence_T(self, device: torch.device) -> Tensor:
        """int64 in 0..B-1: whose each token is."""
        if self.pieces is not None:
            ids = torch.from_numpy(self.pieces.piece_ids_T())
            return self.share.own_run(ids, self.num_tokens).to(device)
        first = self.share.tp_rank * self.num_tokens
        tokens_T = torch.arange(first, first + self.num_tokens, device=device)
        return tokens_T // self._equal_length

    def summed_by_sequence(self, counts_BX: Tensor) -> Tensor:
        """Of whole sequences, from what each rank has counted in its tokens of them. Not differentiable. With ranks a collective; one
        over the ranks of a piece, which goes around their ring."""
        summed_BX = counts_BX.clone()
        if self.share.group is not None:
            dist.all_reduce(summed_BX, group=self.share.group)
        for index, piece in enumerate(self.pieces.pieces if self.pieces is not None else ()):
            if len(piece.ranks) > 1:
                ring = Ring(self.share.data_group, piece.ranks, piece.rank)
                summed_BX[index] = ring.total(summed_BX[index])
        return summed_BX

    def by_sequence(self, device: torch.device) -> "BySequence":
        """How to bring what `gathered` gives into sequences. With ranks a collective. Raises ValueError for pieces of them."""
        self._check_whole()
        if self.share.group is None:
            return BySequence(num_sequences=self.num_sequences)
        order_U = self.gathered(self.sequence_T(device)).argsort(stable=True)
        return BySequence(num_sequences=self.num_sequences, order_U=order_U)

    def gathered(self, x: Tensor) -> Tensor:
        """[U, ...] from each rank's [T, ...], in order of rank. With ranks a collective; differentiable. Raises ValueError for pieces
        of sequences."""
        self._check_whole()
        return x if self.share.group is None else TensorParallel(self.share.group).gather(x)

    def own(self, x: Tensor) -> Tensor:
        """This rank's [T, ...] of what `gathered` gives."""
        first = self.share.rank * self.num_tokens
        return x[first : first + self.num_tokens]

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks, which each goes on to use for its own tokens. With ranks a collective; differentiable."""
        return x if self.share.group is None else TensorParallel(self.share.group).total(x)

    @property
    def _equal_length(self) -> int:
        assert self.seq_len is not None, "without pieces sequences are of equal length"
        return self.seq_len

    def _check_whole(self) -> None:
        if self.pieces is not None:
            raise ValueError(
                "whole sequences are asked for, and ranks have pieces of them (batch.policy): a router that looks at whole ones "
                "has needs_whole_sequences = True in its class"
            )


@dataclass(frozen=True, kw_only=True)
class BySequence:
    """The tokens of all ranks that share sequences, sequence by sequence."""

    num_sequences: int
    order_U: Tensor | None = None
    """int64; None = they are in order."""

    def split(self, x: Tensor) -> Tensor:
        """[U, ...] to [B, S, ...]."""
        x = x if self.order_U is None else x[self.order_U]
        return x.view(self.num_sequences, -1 if len(x) else 0, *x.shape[1:])

    def join(self, x: Tensor) -> Tensor:
        """[B, S, ...] to [U, ...], the inverse."""
        x = x.flatten(0, 1)
        return x if self.order_U is None else x[self.order_U.argsort()]
