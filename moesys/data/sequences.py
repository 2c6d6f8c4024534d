"""The documents of a token stream as sequences of any length, and which tokens each is.

A document of n tokens is n - 1 inputs, whose targets are the tokens after them; one with more than the longest sequence may have
is cut into several, of which no target is lost.

Shapes: D documents, S sequences, B sequences asked for.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesys.data.indexed import IndexedTokens
from moesys.plan.placement import Integers

LongDocuments = Literal["cut", "skip", "refuse"]
EmptyDocuments = Literal["skip", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Of one stream, numbered in its order."""

    longest_tokens: int
    offsets_D: Integers
    """First token of each document."""
    inputs_D: Integers
    """Tokens of each document that have a target; 0 of one that is skipped."""
    ends_D: Integers
    """Sequences of the stream up to each document's end."""
    num_skipped: int
    """Documents that are not read."""

    @property
    def number(self) -> int:
        return int(self.ends_D[-1]) if len(self.ends_D) else 0

    @property
    def num_inputs(self) -> int:
        """Of all sequences."""
        return int(self.inputs_D.sum())

    def starts_and_lengths(self, sequences_B: Integers) -> tuple[Integers, Integers]:
        """int64 [B] each: first token in the stream, and number of inputs."""
        documents_B = np.searchsorted(self.ends_D, sequences_B, side="right")
        inputs_B = self.inputs_D[documents_B]
        parts_B = -(-inputs_B // self.longest_tokens)
        part_B = sequences_B - (self.ends_D[documents_B] - parts_B)
        before_B = part_B * self.longest_tokens
        lengths_B = np.minimum(self.longest_tokens, inputs_B - before_B)
        return self.offsets_D[documents_B] + before_B, lengths_B


def find_sequences(
    tokens: IndexedTokens,
    longest_tokens: int,
    *,
    long_documents: LongDocuments = "cut",
    empty_documents: EmptyDocuments = "skip",
) -> Sequences:
    """Of all documents. Those with fewer than two tokens have no target and are empty.

    Raises:
        ValueError: there is a document that is to be refused: names the file, the first such document and both numbers; or nothing
            is left.
    """
    offsets_D = tokens.document_offsets
    inputs_D = np.maximum(np.diff(offsets_D) - 1, 0)
    is_empty_D, is_long_D = inputs_D == 0, inputs_D > longest_tokens
    if empty_documents == "refuse" and is_empty_D.any():
        raise ValueError(
            f"{tokens.idx_path}: document {_first(is_empty_D)} has fewer than 2 tokens, so no target, as "
            f"{int(is_empty_D.sum())} of {len(inputs_D)} documents: make the data without them, or set "
            "batch.empty_documents=skip"
        )
    if long_documents == "refuse" and is_long_D.any():
        first = _first(is_long_D)
        raise ValueError(
            f"{tokens.idx_path}: document {first} has {int(inputs_D[first])} tokens with a target, and a sequence at most "
            f"data.seq_len={longest_tokens}, as {int(is_long_D.sum())} of {len(inputs_D)} documents: raise data.seq_len, or "
            "set batch.long_documents=cut or skip"
        )
    if long_documents == "skip":
        inputs_D = np.where(is_long_D, 0, inputs_D)
    if not inputs_D.any():
        raise ValueError(
            f"{tokens.idx_path}: none of its {len(inputs_D)} documents is left: {int(is_empty_D.sum())} have no target, "
            f"{int(is_long_D.sum())} more than data.seq_len={longest_tokens}"
        )
    return Sequences(
        longest_tokens=longest_tokens,
        offsets_D=offsets_D[:-1],
        inputs_D=inputs_D,
        ends_D=np.cumsum(-(-inputs_D // longest_tokens)),
        num_skipped=int((inputs_D == 0).sum()),
    )


def _first(is_one_D: np.ndarray) -> int:
    return int(is_one_D.argmax())
