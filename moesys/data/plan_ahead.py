"""Batch plans from a process beside the training loop, so that no step waits for one.

The process reads one request a line and answers with one plan a line, both JSON; it ends with its input, so that none is left
behind by a rank that is killed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.figures import BatchFigures, figures
from moesys.plan.batch.plan import BatchPlan
from moesys.plan.batch.policies import batch_seconds, planned
from moesys.plan.placement import Integers


class PlannedStep(NamedTuple):
    """With what is expected of it."""

    plan: BatchPlan
    figures: BatchFigures

    def to_json(self) -> list[Any]:
        """Plain values."""
        return [self.plan.to_json(), asdict(self.figures)]

    @classmethod
    def from_json(cls, told: Sequence[Any]) -> Self:
        """The same."""
        plan, found = told
        return cls(BatchPlan.from_json(plan), BatchFigures(**found))


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """All that a step's plan follows from but the sequences' lengths."""

    policy: str
    num_ranks: int
    capacity_tokens: int
    """Of a rank in a micro-step."""
    costs: BatchCosts
    meets: bool
    """Ranks do in every layer."""
    longest_tokens: int = 0
    """Of a sequence of any step."""
    stages: int = 1
    """Of each rank's pipeline."""
    block_token_bytes: float = 0.0
    """Of a token, from one rank of a ring to the next, in all layers."""

    def plan(self, lengths_S: Integers) -> PlannedStep:
        """Here and now."""
        plan = planned(
            self.policy,
            lengths_S,
            self.num_ranks,
            self.capacity_tokens,
            self.costs,
            meets=self.meets,
            stages=self.stages,
            longest_tokens=self.longest_tokens,
        )
        step_s = batch_seconds(plan, self.costs, meets=self.meets, stages=self.stages)
        found = figures(
            plan,
            self.costs,
            step_s,
            stages=self.stages,
            block_token_bytes=self.block_token_bytes,
        )
        return PlannedStep(plan, found)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "PlanRequest":
        """The same."""
        return cls(**told | {"costs": costs_from_json(told["costs"])})  # pyright: ignore


def costs_from_json(told: Mapping[str, Any]) -> BatchCosts:
    """From what dataclasses.asdict made of them."""
    costs = dict(told)
    kinds = tuple(AttentionKind(**kind) for kind in costs.pop("attention"))
    return BatchCosts(attention=kinds, **costs)


class PlanAhead:
    """Plans of one run's steps by the position at which each begins."""

    def __init__(self, request: PlanRequest) -> None:
        self._request = request
        self._plans: dict[int, tuple[Integers, Future[PlannedStep]]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="plan-ahead")

    def begin(self, position: int, lengths_S: Integers) -> None:
        """Let the plan of the step from there be made, if it is not yet."""
        if position not in self._plans or not np.array_equal(self._plans[position][0], lengths_S):
            self._plans[position] = lengths_S, self._asking.submit(self._ask, lengths_S)

    def take(self, position: int, lengths_S: Integers) -> PlannedStep:
        """The plan of the step from there; those of steps up to it are forgotten.

        Raises:
            RuntimeError: the process that makes plans has ended.
        """
        self.begin(position, lengths_S)
        step = self._plans[position][1].result()
        self._plans = {at: kept for at, kept in self._plans.items() if at > position}
        return step

    def close(self) -> None:
        """End the process. Plans that are not taken are lost."""
        self._asking.shutdown(cancel_futures=True)
        if self._process is not None:
            with suppress(OSError):
                self._stdin.close()
            self._process.wait()
            self._process = None

    def _ask(self, lengths_S: Integers) -> PlannedStep:
        if self._process is None:
            # One thread: the training loop has the processors.
            alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moesys.data.plan_ahead"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | alone,
            )
            self._say(self._request.to_json())
        self._say(lengths_S.tolist())
        assert self._process.stdout is not None
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(
                f"the process that makes batch plans has ended (exit code {self._process.wait()}): what it said is above; "
                "batch.plan_ahead_steps=0 makes plans without it"
            )
        return PlannedStep.from_json(json.loads(answer))

    @property
    def _stdin(self) -> Any:
        assert self._process is not None
        return self._process.stdin

    def _say(self, value: object) -> None:
        with suppress(BrokenPipeError):  # it has ended: no answer will come
            self._stdin.write(json.dumps(value) + "\n")
            self._stdin.flush()


def main() -> None:
    """What the process does: a request, then lengths, a plan for each."""
    request = PlanRequest.from_json(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        step = request.plan(np.array(json.loads(line), dtype=np.int64))
        sys.stdout.write(json.dumps(step.to_json()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
