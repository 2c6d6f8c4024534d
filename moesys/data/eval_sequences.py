"""Held-out documents as sequences, shared out over ranks as training's are.

Shapes: S sequences.
"""

from collections.abc import Iterator

import numpy as np

from moesys.data.indexed import IndexedTokens
from moesys.data.pieces import rank_batch
from moesys.data.plan_ahead import PlanRequest
from moesys.data.sequences import LongDocuments, find_sequences
from moesys.data.step_batch import RankBatch
from moesys.plan.placement import Integers


class EvalSequences:
    """One pass over held-out sequences, the same number of batches on every rank.

    With fewer than all tokens asked for, sequences spread evenly over the stream: as many as have at most so many targets, and one
    at least.

    Args:
        batch_tokens: that are planned at once.
        eval_tokens: targets over all ranks; 0 = all.
        Others as in SequenceLoader.

    Raises:
        ValueError: a stream without a single target.
    """

    def __init__(
        self,
        tokens: IndexedTokens,
        *,
        longest_tokens: int,
        batch_tokens: int,
        request: PlanRequest,
        dp_rank: int,
        eval_tokens: int = 0,
        multiple_of: int = 1,
        long_documents: LongDocuments = "cut",
    ) -> None:
        self._tokens, self._request = tokens, request
        self._dp_rank, self._multiple_of = dp_rank, multiple_of
        sequences = find_sequences(tokens, longest_tokens, long_documents=long_documents)
        taken_S = _spread(sequences.number, sequences.num_inputs, eval_tokens)
        self._starts_S, self._lengths_S = sequences.starts_and_lengths(taken_S)
        if eval_tokens:
            fitting = int(np.searchsorted(np.cumsum(self._lengths_S), eval_tokens, side="right"))
            self._starts_S = self._starts_S[: max(1, fitting)]
            self._lengths_S = self._lengths_S[: max(1, fitting)]
        self.num_targets = int(self._lengths_S.sum())
        """Over all ranks and batches."""
        first_S = (np.cumsum(self._lengths_S) - self._lengths_S) // batch_tokens
        ends = np.flatnonzero(np.diff(first_S)) + 1
        self._plans = [
            (run.start, request.plan(self._lengths_S[run]).plan)
            for run in map(slice, [0, *ends.tolist()], [*ends.tolist(), len(first_S)])
        ]

    def __len__(self) -> int:
        """Batches per rank."""
        return sum(len(plan.micro_steps) for _, plan in self._plans)

    def __iter__(self) -> Iterator[RankBatch]:
        for first, plan in self._plans:
            starts_S = self._starts_S[first : first + len(plan.lengths_S)]
            tokens_S = [
                self._tokens.tokens_N[start : start + length + 1]
                for start, length in zip(starts_S.tolist(), plan.lengths_S.tolist(), strict=True)
            ]
            for step in plan.micro_steps:
                yield rank_batch(
                    step, plan.lengths_S, self._dp_rank, tokens_S, multiple_of=self._multiple_of
                )


def _spread(number: int, num_inputs: int, eval_tokens: int) -> Integers:
    """int64: sequences with about so many inputs, in order."""
    share = min(1.0, eval_tokens / num_inputs) if eval_tokens else 1.0
    taken = max(1, round(number * share))
    return np.arange(taken, dtype=np.int64) * number // taken
