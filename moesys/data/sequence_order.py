"""Which documents, as sequences, each step has: the order that training and `moesys plan batch` read. Reads no text.

Samples are the sequences of moesys.data.sequences, in the order of moesys.data.mixed_order. A step takes as many of them as make
at most G tokens, and one at least, whatever the number of ranks: the next begins where it ends.

Shapes: S sequences of a step, B positions asked for, G tokens of a step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moesys.data.mixed_order import MixedOrder
from moesys.data.sequences import EmptyDocuments, LongDocuments, find_sequences
from moesys.data.source import Source, SourceOrder
from moesys.plan.placement import Integers


class StepSequences(NamedTuple):
    """Where they are."""

    first: int
    """Position of the first one."""
    sources_S: Integers
    starts_S: Integers
    """First tokens, in the sources' streams."""
    lengths_S: Integers


class SequenceOrder(MixedOrder):
    """All ranks' sequences, step after step.

    Args:
        sources: one, or several with names and weights, of their sequences.
        longest_tokens: a sequence may have.
        global_batch_tokens: a step may have (G).
        Others as in `find_sequences` and TokenLoader.

    Raises:
        ValueError: as `find_sequences`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        longest_tokens: int,
        global_batch_tokens: int,
        seed: int,
        shuffle: bool,
        long_documents: LongDocuments = "cut",
        empty_documents: EmptyDocuments = "skip",
    ) -> None:
        self.sequences = [
            find_sequences(
                source.tokens,
                longest_tokens,
                long_documents=long_documents,
                empty_documents=empty_documents,
            )
            for source in sources
        ]
        """Of each source."""
        orders = [
            SourceOrder(source, num_samples=of.number, seed=seed, shuffle=shuffle)
            for source, of in zip(sources, self.sequences, strict=True)
        ]
        facts = {
            "sequences": "documents",
            "long_documents": long_documents,
            "seq_len": longest_tokens,
            "seed": seed,
            "shuffle": shuffle,
        }
        super().__init__(sources, orders, facts)
        self._global_batch_tokens = global_batch_tokens

    def samples_in(self, num_tokens: int) -> float:
        """So many tokens are, with the mix as it is now and sequences of mean length."""
        means_N = (of.num_inputs / of.number for of in self.sequences)
        return num_tokens / sum(w * m for w, m in zip(self.mix.weights_N, means_N, strict=True))

    def step_from(self, first: int) -> StepSequences:
        """The sequences of the step that begins at a position."""
        number = max(16, int(self.samples_in(self._global_batch_tokens) * 1.2))
        while True:
            step = self._sequences_at(first, number)
            ends_S = np.cumsum(step.lengths_S)
            if ends_S[-1] > self._global_batch_tokens:
                break
            number *= 2
        taken = max(1, int(np.searchsorted(ends_S, self._global_batch_tokens, side="right")))
        return StepSequences(first, *(x[:taken] for x in step[1:]))

    def _sequences_at(self, first: int, number: int) -> StepSequences:
        positions_B = np.arange(first, first + number, dtype=np.int64)
        sources_B, places_B = self.mix.at(positions_B)
        starts_B, lengths_B = np.empty_like(places_B), np.empty_like(places_B)
        for index in np.unique(sources_B):
            here = sources_B == index
            found_B = self.orders[index].samples_at(places_B[here])
            starts_B[here], lengths_B[here] = self.sequences[index].starts_and_lengths(found_B)
        return StepSequences(first, sources_B, starts_B, lengths_B)
