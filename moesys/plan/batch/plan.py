"""Which ranks work on which sequences of a global batch, in which micro-step. A value: planned, checked, drawn, replayed. Pure.

Ranks are those that have the same parameters and read different data (the group of hybrid data parallelism, ByteScale,
2502.21231, section 4): any number of them share a sequence as a ring, any number of sequences are packed on one.

Shapes: S sequences, R ranks, M micro-steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from moesys.plan.placement import Integers
from moesys.plan.zigzag import ring_tokens

VERSION = 1


class Piece(NamedTuple):
    """A sequence, on one rank or in slices on several."""

    sequence: int
    """Its place in the batch."""
    ranks: tuple[int, ...]
    """In the order of their ring."""


MicroStep = tuple[Piece, ...]
"""Ranks that share several of its pieces work on these in the order of `of_rank`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPlan:
    """Every rank goes through the micro-steps in order; in one that gives it no piece it has no tokens."""

    lengths_S: Integers
    num_ranks: int
    micro_steps: tuple[MicroStep, ...]

    def of_rank(self, rank: int) -> list[list[Piece]]:
        """Its pieces in each micro-step."""
        return [of_rank(step, rank) for step in self.micro_steps]

    def tokens_MR(self) -> Integers:
        """Of each rank in each micro-step."""
        tokens_MR = np.zeros((len(self.micro_steps), self.num_ranks), dtype=np.int64)
        for tokens_R, step in zip(tokens_MR, self.micro_steps, strict=True):
            tokens_R += tokens_of_ranks(step, self.lengths_S, self.num_ranks)
        return tokens_MR

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """With their micro-steps, in order."""
        for index, step in enumerate(self.micro_steps):
            for piece in step:
                yield index, piece

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "version": VERSION,
            "num_ranks": self.num_ranks,
            "lengths": self.lengths_S.tolist(),
            "micro_steps": [
                [[piece.sequence, list(piece.ranks)] for piece in step] for step in self.micro_steps
            ],
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Self:
        """The same.

        Raises:
            ValueError: it is of another version.
        """
        if told.get("version") != VERSION:
            raise ValueError(
                f"a batch plan of version {told.get('version')!r}, where {VERSION} is read: plan it again"
            )
        return cls(
            lengths_S=np.array(told["lengths"], dtype=np.int64),
            num_ranks=told["num_ranks"],
            micro_steps=tuple(
                tuple(Piece(sequence, tuple(ranks)) for sequence, ranks in step)
                for step in told["micro_steps"]
            ),
        )


def of_rank(step: MicroStep, rank: int) -> list[Piece]:
    """Its pieces of a micro-step, in the plan's order; but those on the same ranks, whose keys go around as one block, come
    together, where the first of them is."""
    alike: dict[tuple[int, ...], list[Piece]] = {}
    for piece in step:
        if rank in piece.ranks:
            alike.setdefault(piece.ranks, []).append(piece)
    return [piece for pieces in alike.values() for piece in pieces]


def tokens_of_ranks(step: MicroStep, lengths_S: Integers, num_ranks: int) -> Integers:
    """int64 [R]: of each in a micro-step."""
    tokens_R = np.zeros(num_ranks, dtype=np.int64)
    whole = np.array([(p.sequence, *p.ranks) for p in step if len(p.ranks) == 1], dtype=np.int64)
    sequences, ranks = whole.reshape(-1, 2).T
    np.add.at(tokens_R, ranks, lengths_S[sequences])
    for sequence, ring in step:
        if len(ring) > 1:
            tokens_R[list(ring)] += ring_tokens(int(lengths_S[sequence]), len(ring))
    return tokens_R


def problems(plan: BatchPlan, capacity_tokens: int) -> list[str]:
    """What keeps a plan from being executed, in words; each kind once, with the first case of it."""
    found: list[str] = []
    seen_S = np.zeros(len(plan.lengths_S), dtype=np.int64)
    for index, piece in plan.pieces():
        if not 0 <= piece.sequence < len(seen_S):
            return [f"micro-step {index} has sequence {piece.sequence} of {len(seen_S)}"]
        if not piece.ranks or not all(0 <= rank < plan.num_ranks for rank in piece.ranks):
            return [
                f"sequence {piece.sequence} is on ranks {[*piece.ranks]}, which are to be some of 0 to {plan.num_ranks - 1}"
            ]
        if len(set(piece.ranks)) < len(piece.ranks):
            return [f"sequence {piece.sequence} is twice on a rank: {[*piece.ranks]}"]
        seen_S[piece.sequence] += 1
    wrong = np.flatnonzero(seen_S != (plan.lengths_S > 0))
    if len(wrong):
        sequence = int(wrong[0])
        found.append(
            f"sequence {sequence} of {int(plan.lengths_S[sequence])} tokens is in {int(seen_S[sequence])} pieces"
        )
    tokens_MR = plan.tokens_MR()
    if tokens_MR.size and tokens_MR.max() > capacity_tokens:
        index, rank = np.unravel_index(int(tokens_MR.argmax()), tokens_MR.shape)
        found.append(
            f"rank {rank} has {int(tokens_MR.max())} tokens in micro-step {index}, and memory for {capacity_tokens}"
        )
    return found


def batch_plan(
    lengths_S: Integers, num_ranks: int, micro_steps: Sequence[Sequence[Piece]]
) -> BatchPlan:
    """Without empty micro-steps."""
    return BatchPlan(
        lengths_S=lengths_S,
        num_ranks=num_ranks,
        micro_steps=tuple(tuple(step) for step in micro_steps if step),
    )
