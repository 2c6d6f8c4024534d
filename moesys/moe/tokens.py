"""What is known of the tokens that a layer routes, besides their activations.

Shapes: T tokens on this rank, U = P * T tokens of the P ranks that share sequences, B sequences of S tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel.tensor import TensorParallel


class SequenceShare(NamedTuple):
    """Which of the tokens of its ranks' common sequences this rank has."""

    group: dist.ProcessGroup | None = None
    """The ranks that share sequences; None = this rank alone has whole ones."""
    tp_rank: int = 0
    """This rank has the tp_rank-th of tp_size equal runs of tokens."""
    tp_size: int = 1

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
    num_tokens: int | None = None
    """U: behind the tokens are rows that are none; None = all are."""

    def own_run(self, share: SequenceShare, num_rows: int) -> "Known":
        """Of this rank's tokens, in a run of so many rows."""
        own = num_rows
        if self.num_tokens is not None:
            own = min(max(0, self.num_tokens - share.tp_rank * num_rows), num_rows)
        ids, places = (x if x is None else share.own_run(x, own) for x in self[:2])
        return Known(ids, places, own)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of one forward of a layer. A router whose forward has a parameter `tokens` is given it."""

    num_tokens: int
    """T."""
    seq_len: int
    """So many tokens in a row, of the ranks that share the same stretches of sequences, are one sequence's."""
    ids_T: Tensor | None = None
    """int64, the vocabulary's; None where the layer is called outside of a model."""
    places_T: Tensor | None = None
    """int64, the place of each among all tokens of an optimizer step; None outside of training."""
    share: SequenceShare = WHOLE_SEQUENCES

    @property
    def num_sequences(self) -> int:
        """B, of which this rank has all tokens or some."""
        return self.num_tokens * self.share.tp_size // self.seq_len

    def sequence_T(self, device: torch.device) -> Tensor:
        """int64 in 0..B-1: whose each token is."""
        first = self.share.tp_rank * self.num_tokens
        tokens_T = torch.arange(first, first + self.num_tokens, device=device)
        return tokens_T // self.seq_len

    def by_sequence(self, device: torch.device) -> "BySequence":
        """How to bring what `gathered` gives into sequences. With ranks a collective."""
        if self.share.group is None:
            return BySequence(num_sequences=self.num_sequences)
        order_U = self.gathered(self.sequence_T(device)).argsort(stable=True)
        return BySequence(num_sequences=self.num_sequences, order_U=order_U)

    def gathered(self, x: Tensor) -> Tensor:
        """[U, ...] from each rank's [T, ...], in order of rank. With ranks a collective; differentiable."""
        return x if self.share.group is None else TensorParallel(self.share.group).gather(x)

    def own(self, x: Tensor) -> Tensor:
        """This rank's [T, ...] of what `gathered` gives."""
        first = self.share.rank * self.num_tokens
        return x[first : first + self.num_tokens]

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks, which each goes on to use for its own tokens. With ranks a collective; differentiable."""
        return x if self.share.group is None else TensorParallel(self.share.group).total(x)


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
