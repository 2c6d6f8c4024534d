"""Batch plans from a process beside the training loop, so that no step waits for one.

The process reads one request a line and answers with one plan a line, both JSON; it ends with its input, so that none is left
behind by a rank that is killed.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.plan import BatchPlan
from moesys.plan.batch.policies import planned
from moesys.plan.placement import Integers


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

    def plan(self, lengths_S: Integers) -> BatchPlan:
        """Here and now."""
        return planned(
            self.policy,
            lengths_S,
            self.num_ranks,
            self.capacity_tokens,
            self.costs,
            meets=self.meets,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "PlanRequest":
        """The same."""
        costs = dict(told["costs"])
        kinds = tuple(AttentionKind(**kind) for kind in costs.pop("attention"))
        own: dict[str, Any] = told | {"costs": BatchCosts(attention=kinds, **costs)}
        return cls(**own)


class PlanAhead:
    """Plans of one run's steps by the position at which each begins."""

    def __init__(self, request: PlanRequest) -> None:
        self._request = request
        self._plans: dict[int, tuple[Integers, Future[BatchPlan]]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="plan-ahead")

    def begin(self, position: int, lengths_S: Integers) -> None:
        """Let the plan of the step from there be made, if it is not yet."""
        if position not in self._plans or not np.array_equal(self._plans[position][0], lengths_S):
            self._plans[position] = lengths_S, self._asking.submit(self._ask, lengths_S)

    def take(self, position: int, lengths_S: Integers) -> BatchPlan:
        """The plan of the step from there; those of steps up to it are forgotten.

        Raises:
            RuntimeError: the process that makes plans has ended.
        """
        self.begin(position, lengths_S)
        plan = self._plans[position][1].result()
        self._plans = {at: kept for at, kept in self._plans.items() if at > position}
        return plan

    def close(self) -> None:
        """End the process. Plans that are not taken are lost."""
        self._asking.shutdown(cancel_futures=True)
        if self._process is not None:
            with suppress(OSError):
                self._stdin.close()
            self._process.wait()
            self._process = None

    def _ask(self, lengths_S: Integers) -> BatchPlan:
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
        return BatchPlan.from_json(json.loads(answer))

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
        plan = request.plan(np.array(json.loads(line), dtype=np.int64))
        sys.stdout.write(json.dumps(plan.to_json()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
