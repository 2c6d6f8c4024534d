"""Steps of documents as sequences of any length, which a plan shares out over the ranks.

Which rank works on which of a step's, in which micro-step, is planned from their lengths alone.

Shapes: S sequences of a step, G tokens of a step.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moesys.data.pieces import rank_batch
from moesys.data.plan_ahead import PlanAhead, PlannedStep, PlanRequest
from moesys.data.sequence_order import SequenceOrder, StepSequences
from moesys.data.sequences import EmptyDocuments, LongDocuments
from moesys.data.source import Source
from moesys.data.step_batch import StepBatch
from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.plan import problems


class SequenceLoader(SequenceOrder):
    """Training batches of one rank.

    Args:
        sources, longest_tokens, global_batch_tokens, seed, shuffle, long_documents, empty_documents: as SequenceOrder's.
        request: how steps are planned.
        dp_rank: this rank among those of the plan.
        skips_empty: leave out micro-steps in which this rank has no piece, instead of giving batches without tokens.
        mtp_depth, multiple_of: as in `rank_batch`.
        plan_ahead_steps: so many plans are made before they are needed, by another process; 0 = none.

    Raises:
        ValueError: as `find_sequences`.
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
        super().__init__(
            sources,
            longest_tokens=longest_tokens,
            global_batch_tokens=global_batch_tokens,
            seed=seed,
            shuffle=shuffle,
            long_documents=long_documents,
            empty_documents=empty_documents,
        )
        self._request = request
        self._dp_rank, self._skips_empty = dp_rank, skips_empty
        self._mtp_depth, self._multiple_of = mtp_depth, multiple_of
        self._tokens_N = [0] * len(self.sources)
        """Read of each source so far."""
        self._num_ahead = plan_ahead_steps
        self._ahead: PlanAhead | None = None
        self._steps: dict[int, StepSequences] = {}
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
        """As SequenceOrder's; what was planned ahead with other weights is planned again."""
        super().turn_mix(weights)
        self._steps.clear()

    def next_step(self) -> StepBatch:
        """This rank's micro-batches of the next step, in order."""
        step = self._kept_step(self.consumed_samples)
        batch = self._batch(step, self._plan_ahead(step))
        self.consumed_samples += len(step.lengths_S)
        read_N = np.bincount(step.sources_S, step.lengths_S, minlength=len(self.sources))
        self._tokens_N = [a + int(b) for a, b in zip(self._tokens_N, read_N, strict=True)]
        self._steps = {first: kept for first, kept in self._steps.items() if first > step.first}
        return batch

    def step_at(self, first_sample: int) -> StepBatch:
        """This rank's micro-batches of the step that begins at this position; the loader stays where it is."""
        step = self._kept_step(first_sample)
        return self._batch(step, self._request.plan(step.lengths_S))

    def close(self) -> None:
        """End the process that plans ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def state_dict(self) -> dict[str, Any]:
        """As SequenceOrder's, with the tokens read."""
        return {**super().state_dict(), "tokens": list(self._tokens_N)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As SequenceOrder's. The number of ranks and G may differ from the run that saved it."""
        super().load_state_dict(state)
        self._tokens_N = list(state["tokens"])

    def _batch(self, step: StepSequences, planned: PlannedStep) -> StepBatch:
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

    def _plan_ahead(self, step: StepSequences) -> PlannedStep:
        if not self._num_ahead:
            return self._request.plan(step.lengths_S)
        if self._ahead is None:
            self._ahead = PlanAhead(self._request)
        planned = self._ahead.take(step.first, step.lengths_S)
        for _ in range(self._num_ahead):
            step = self._kept_step(step.first + len(step.lengths_S))
            self._ahead.begin(step.first, step.lengths_S)
        return planned

    def _kept_step(self, first: int) -> StepSequences:
        """The sequences from a position on that a step has."""
        if first not in self._steps:
            self._steps[first] = self.step_from(first)
        return self._steps[first]
