"""Does a layout train with one process's numbers? Trains a small model under it on gloo ranks and compares.

reference = parity(config, world_size=1, micro_steps=4)
ranks = parity(replace(config, parallel=ParallelConfig(tp=2, ep=2)), world_size=4, micro_steps=4)
compare(ranks, reference[0]).worst          # relative, over losses and all gradients of all steps
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moesys.config.schema import RunConfig
from moesys.ops.shard import detached, said_rows
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, with_micro_steps
from moesys.train.step import StepResult

FIGURES = ("loss", "grad_norm", "balance_loss", "z_loss")


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What one rank saw of a run; tensors are whole, names are the decoder's."""

    results: list[StepResult]
    gradients: list[dict[str, Tensor]]
    """Of each step, as the optimizer gets them: clipped."""
    weights: dict[str, Tensor]
    """After the last step."""
    buffers: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a layout's numbers are from one process's, as |ours - theirs| / |theirs|."""

    figures: float
    """Largest over loss, gradient norm, balance and z loss of all steps and ranks."""
    gradients: float
    """Largest over all parameters, steps and ranks."""
    gradient_name: str
    """Step and parameter of that one."""
    weights: float
    are_counters_equal: bool
    """Expert load of all steps, and buffers, bit for bit."""
    missing: frozenset[str]
    """Parameters whose gradient no rank has."""

    @property
    def worst(self) -> float:
        """Of what must be the same; infinite if a counter differs or a parameter is missing."""
        whole = self.are_counters_equal and not self.missing
        return max(self.figures, self.gradients) if whole else float("inf")


def parity(
    config: RunConfig, world_size: int, micro_steps: int, timeout_s: float = 240.0
) -> list[Numbers]:
    """Train `config.train.steps` steps on that many ranks of this machine; the numbers of each rank."""
    return run_ranks(train_small, world_size, config, micro_steps, timeout_s=timeout_s)


def train_small(rank: int, world_size: int, config: RunConfig, micro_steps: int) -> Numbers:
    """Collective. The micro-batch follows from the layout and `micro_steps`."""
    run = SmallRun(with_micro_steps(config, world_size, micro_steps), world_size)
    gradients: list[dict[str, Tensor]] = []

    def keep_gradients(*_: object) -> None:
        named = run.model.named_parameters()
        gradients.append({n: whole(p.grad, p) for n, p in named if p.grad is not None})

    run.optimizer.register_step_pre_hook(keep_gradients)
    results = [run.step() for _ in range(config.train.steps)]
    return Numbers(
        results=results,
        gradients=gradients,
        weights={n: whole(detached(p)) for n, p in run.model.named_parameters()},
        buffers={n: b.clone() for n, b in run.model.named_buffers()},
    )


def compare(ranks: Sequence[Numbers], reference: Numbers) -> Difference:
    """The largest differences between any rank's numbers and the reference's."""
    figures, gradients, weights = 0.0, (0.0, ""), 0.0
    are_counters_equal, seen = True, set[str]()
    for numbers in ranks:
        seen |= numbers.weights.keys() & numbers.gradients[0].keys()
        for step, (ours, theirs) in enumerate(zip(numbers.results, reference.results, strict=True)):
            pairs = [(getattr(ours, name), getattr(theirs, name)) for name in FIGURES]
            figures = max([figures, *(_finite(abs(a - b) / max(abs(b), 1e-30)) for a, b in pairs)])
            are_counters_equal &= ours.expert_load_ME == theirs.expert_load_ME
            errors = _errors(numbers.gradients[step], reference.gradients[step])
            gradients = max(
                [gradients, *((e, f"step {step}: {name}") for name, e in errors.items())]
            )
        weights = max([weights, *_errors(numbers.weights, reference.weights).values()])
        are_counters_equal &= all(
            torch.equal(buffer, reference.buffers[name]) for name, buffer in numbers.buffers.items()
        )
    return Difference(
        figures=figures,
        gradients=gradients[0],
        gradient_name=gradients[1],
        weights=weights,
        are_counters_equal=are_counters_equal,
        missing=frozenset(reference.gradients[0].keys() - seen),
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| over the whole tensor; infinite where one of them is not a number."""
    return _finite(((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item())


def whole(tensor: Tensor, of: Tensor | None = None) -> Tensor:
    """Collective for a DTensor: all of it. `of`: the parameter of which it is the gradient or a state."""
    if not isinstance(tensor, DTensor):
        return tensor.clone()
    rows = said_rows(tensor if of is None else of)
    return tensor.full_tensor().clone() if rows is None else _from_rows(tensor, rows)


def _from_rows(tensor: DTensor, rows: Sequence[int]) -> Tensor:
    """Of a tensor of which each rank has any rows of dim 0, over the first axis of its mesh; cut evenly over others."""
    part = tensor.to_local().clone()
    for axis, placement in enumerate(tensor.placements):
        group = tensor.device_mesh.get_group(axis)
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, (rows, part), group=group)
        if placement == Shard(0):
            part = part.new_empty(tensor.shape[0], *part.shape[1:])
            for rows_there, local in parts:
                part[list(rows_there)] = local
        else:
            assert isinstance(placement, Shard)
            part = torch.cat([local for _, local in parts], dim=placement.dim)
    return part


def _finite(error: float) -> float:
    """max() would pass a nan over."""
    return float("inf") if math.isnan(error) else error


def _errors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(tensor, theirs[name]) for name, tensor in ours.items()}
