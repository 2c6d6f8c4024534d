"""A step that its judge refuses leaves no trace; one that it lets through is the step that no one judged."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moesys.config.schema import ParallelConfig, RunConfig
from moesys.ops.shard import local_tensor
from moesys.testing.layouts import BASE, LAYOUTS
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, samples_of_step, with_micro_steps
from moesys.train.state import run_tensors
from moesys.train.step import StepResult

MICRO_STEPS = 4


@dataclass(frozen=True)
class Seen:
    """By one rank."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    """The refused step."""
    refused: StepResult
    judged: list[tuple[float, float]]
    results: list[StepResult]
    """Of all steps but that."""
    end: dict[str, Tensor]


def steps(rank: int, world_size: int, config: RunConfig, refuse: bool) -> Seen:
    """Two steps, a refused one or none, a step."""
    run = SmallRun(with_micro_steps(config, world_size, MICRO_STEPS), world_size)
    judged: list[tuple[float, float]] = []

    def step(number: int, rate: float | None) -> StepResult:
        def judge(loss: float, grad_norm: float) -> float | None:
            judged.append((loss, grad_norm))
            return rate

        samples = (run.config, number, run.meshes.dp_rank, run.dims.dp, MICRO_STEPS)
        lr = 1.0 if refuse else config.optim.lr  # without a refused step there is no judge either
        return run.train_step(samples_of_step(*samples), lr, judge=judge if refuse else None)

    def copies() -> dict[str, Tensor]:
        tensors = run_tensors(run.model, run.optimizer)
        return {name: local_tensor(tensor.detach()).clone() for name, tensor in tensors.items()}

    results = [step(number, config.optim.lr) for number in (0, 1)]
    before = copies()
    refused = step(9, None) if refuse else results[-1]
    after = copies()
    results.append(step(2, config.optim.lr))
    return Seen(before, after, refused, judged, results, copies())


@pytest.mark.parametrize(
    "name",
    ["one", "zero", *(pytest.param(x, marks=pytest.mark.parity) for x in ("ep", "pp", "tp"))],
)
def test_a_refused_step_leaves_no_trace(name):
    size, degrees = LAYOUTS[name] if name != "one" else (1, {})
    config = replace(BASE, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
    with_refusal = run_ranks(steps, size, config, True, timeout_s=240)
    without = run_ranks(steps, size, config, False, timeout_s=240)
    for ours, theirs in zip(with_refusal, without, strict=True):
        assert not ours.refused.is_applied
        assert all(result.is_applied for result in [*ours.results, *theirs.results])
        assert any("selection_bias" in key for key in ours.before) or name == "pp"
        for key, tensor in ours.before.items():
            assert torch.equal(tensor, ours.after[key]), key
        # Nor in what the next step counts, or in its balance loss of the global batch.
        for mine, other in zip(ours.results, theirs.results, strict=True):
            assert replace(mine, exchange_ms=0.0) == replace(other, exchange_ms=0.0)
        for key, tensor in theirs.end.items():
            assert torch.equal(tensor, ours.end[key]), key
        assert ours.judged == with_refusal[0].judged, "all ranks judge by the same bits"
        assert [loss for loss, _ in ours.judged] == [
            result.loss for result in (*ours.results[:2], ours.refused, ours.results[2])
        ]
