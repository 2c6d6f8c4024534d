"""Steps of documents as sequences of any length, which a plan shares out over the ranks.

Samples are the sequences of moesys.data.sequences, in the order of moesys.data.mixed_order. A step takes as many of them as make
at most G tokens, and one at least, whatever the number of ranks: the next begins where it ends. Which rank works on which of
them, in which micro-step, is planned from their lengths alone.

Shapes: S sequences of a step, B positions asked for, G tokens of a step.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from moesys.data.mixed_order import MixedOrder
from moesys.data.pieces import rank_batch
from moesys.data.plan_ahead import PlanAhead, PlannedStep, PlanRequest
from moesys.data.sequences import EmptyDocuments, LongDocuments, find_sequences
from moesys.data.source import Source, SourceOrder
from moesys.data.step_batch import StepBatch
from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.plan import problems
from moesys.plan.placement import Integers


class _Step(NamedTuple):
    """Where the sequences of a step are."""

    first: int
    """Position of the first one."""
    sources_S: Integers
    starts_S: Integers
    """First tokens, in the sources' streams."""
    lengths_S: Integers


class SequenceLoader(MixedOrder):
    """Training batches of one rank.

    Args:
        sources: one, or several with names and weights, of their sequences.
        longest_tokens: a sequence may have.
        global_batch_tokens: a step may have (G).
        request: how steps are planned.
        dp_rank: this rank among those of the plan.
        skips_empty: leave out micro-steps in which this rank has no piece, instead of giving batches without tokens.
        mtp_depth, multiple_of: as in `rank_batch`.
        plan_ahead_steps: so many plans are made before they are needed, by another process; 0 = none.
        Others as in `find_sequences` and TokenLoader.

    Raises:
        ValueError: there are fewer tokens than one step has; or as `find_sequences`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        longest_tokens: int,
        global_batch_tokens: int,
        request: PlanRequest,
        dp_rank: int,
        seed: int,
        shuffle: bool,
        skips_empty: bool,
        mtp_depth: int = 0,
        multiple_of: int = 1,
        long_documents: LongDocuments = "cut",
        empty_documents: EmptyDocuments = "skip",
        plan_ahead_steps: int = 0,
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
        self._request = request
        self._global_batch_tokens = global_batch_tokens
        self._dp_rank, self._skips_empty = dp_rank, skips_empty
        self._mtp_depth, self._multiple_of = mtp_depth, multiple_of
        self._tokens_N = [0] * len(self.sources)
        """Read of each source so far."""
        self._num_ahead = plan_ahead_steps
        self._ahead: PlanAhead | None = None
        self._steps: dict[int, _Step] = {}
        """That have been looked up and not yet read."""
        self.planned: PlannedStep | None = None
        """The step last read."""

    @property
    def consumed_tokens(self) -> int:
        """Of `consumed_samples`."""
        return sum(self._tokens_N)

    def tokens_of_sources(self) -> dict[str, int]:
        """Of `consumed_tokens` those of each source, by name."""
        names = (source.name for source in self.sources)
        return dict(zip(names, self._tokens_N, strict=True))

    def samples_in(self, num_tokens: int) -> float:
        """So many tokens are, with the mix as it is now and sequences of mean length."""
        means_N = (of.num_inputs / of.number for of in self.sequences)
        return num_tokens / sum(w * m for w, m in zip(self.mix.weights_N, means_N, strict=True))

    def plan_fields(self) -> dict[str, Any]:
        """Of the step last read, for records: its sequences, its micro-steps, and what was expected of it."""
        if self.planned is None:
            return {}
        plan, found = self.planned
        return {
            "sequences": int((plan.lengths_S > 0).sum()),
            "micro_steps": found.micro_steps,
            "planned_ms": found.step_s * 1e3,
            "planned_idle": found.idle_share,
            "planned_keys_wait": found.keys_share,
            "ring_bytes": int(found.ring_bytes),
        }

    def plan_by(self, costs: BatchCosts) -> None:
        """Before the first step is read."""
        self._request = replace(self._request, costs=costs)

    def turn_mix(self, weights: Sequence[float]) -> None:
        """As MixedOrder's; what was planned ahead with other weights is planned again."""
        super().turn_mix(weights)
        self._steps.clear()

    def next_step(self) -> StepBatch:
        """This rank's micro-batches of the next step, in order."""
        step = self._step_from(self.consumed_samples)
        batch = self._batch(step, self._plan_ahead(step))
        self.consumed_samples += len(step.lengths_S)
        read_N = np.bincount(step.sources_S, step.lengths_S, minlength=len(self.sources))
        self._tokens_N = [a + int(b) for a, b in zip(self._tokens_N, read_N, strict=True)]
        self._steps = {first: kept for first, kept in self._steps.items() if first > step.first}
        return batch

    def step_at(self, first_sample: int) -> StepBatch:
        """This rank's micro-batches of the step that begins at this position; the loader stays where it is."""
        step = self._step_from(first_sample)
        return self._batch(step, self._request.plan(step.lengths_S))

    def close(self) -> None:
        """End the process that plans ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def state_dict(self) -> dict[str, Any]:
        """As MixedOrder's, with the tokens read."""
        return {**super().state_dict(), "tokens": list(self._tokens_N)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As MixedOrder's. The number of ranks and G may differ from the run that saved it."""
        super().load_state_dict(state)
        self._tokens_N = list(state["tokens"])

    def _batch(self, step: _Step, planned: PlannedStep) -> StepBatch:
        """Raises ValueError for a plan that cannot be executed."""
        plan, self.planned = planned.plan, planned
        if found := problems(plan, self._request.capacity_tokens):
            raise ValueError(f"the plan of a step by batch.policy={self._request.policy}: {found}")
        tokens_S = [
            self.sources[source].tokens.tokens_N[start : start + length + 1]
            for source, start, length in zip(*(x.tolist() for x in step[1:]), strict=True)
        ]
        batches = [
            rank_batch(
                micro_step,
                step.lengths_S,
                self._dp_rank,
                tokens_S,
                self._mtp_depth,
                self._multiple_of,
            )
            for micro_step in plan.micro_steps
        ]
        if self._skips_empty:
            # One at least, so that this rank has gradients to sum up too.
            batches = [b for b in batches if b.pieces and b.pieces.pieces] or batches[:1]
        return StepBatch(micro_batches=batches, lengths_L=step.lengths_S)

    def _plan_ahead(self, step: _Step) -> PlannedStep:
        if not self._num_ahead:
            return self._request.plan(step.lengths_S)
        if self._ahead is None:
            self._ahead = PlanAhead(self._request)
        planned = self._ahead.take(step.first, step.lengths_S)
        for _ in range(self._num_ahead):
            step = self._step_from(step.first + len(step.lengths_S))
            self._ahead.begin(step.first, step.lengths_S)
        return planned

    def _step_from(self, first: int) -> _Step:
        """The sequences from a position on that a step has."""
        if first not in self._steps:
            self._steps[first] = self._find_step(first)
        return self._steps[first]

    def _find_step(self, first: int) -> _Step:
        number = max(16, int(self.samples_in(self._global_batch_tokens) * 1.2))
        while True:
            step = self._sequences_at(first, number)
            ends_S = np.cumsum(step.lengths_S)
            if ends_S[-1] > self._global_batch_tokens:
                break
            number *= 2
        taken = max(1, int(np.searchsorted(ends_S, self._global_batch_tokens, side="right")))
        return _Step(first, *(x[:taken] for x in step[1:]))

    def _sequences_at(self, first: int, number: int) -> _Step:
        positions_B = np.arange(first, first + number, dtype=np.int64)
        sources_B, places_B = self.mix.at(positions_B)
        starts_B, lengths_B = np.empty_like(places_B), np.empty_like(places_B)
        for index in np.unique(sources_B):
            here = sources_B == index
            found_B = self.orders[index].samples_at(places_B[here])
            starts_B[here], lengths_B[here] = self.sequences[index].starts_and_lengths(found_B)
        return _Step(first, sources_B, starts_B, lengths_B)
