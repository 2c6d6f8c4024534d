"""A small real run, on gloo ranks, in which chosen batches are poisoned; and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moesys.config.compose import compose
from moesys.ops.shard import local_tensor
from moesys.parallel.bootstrap import Process
from moesys.testing.ranks import run_ranks
from moesys.train.setup import build_run
from moesys.train.signals import StopRequest
from moesys.train.state import run_tensors
from moesys.train.trainer import Trainer
from tests.train.launched import overrides

BATCH = 16
"""Samples of a step."""


@dataclass(frozen=True)
class Poison:
    """The batch of step `step`, as counted without a roll back, is not as it should be."""

    step: int
    kind: str
    """loss: it and its gradients are multiplied; gradient: they alone; die: this start of the run ends here."""
    factor: float = float("nan")
    again: bool = False
    """Also when it is trained on a second time."""


@dataclass(frozen=True)
class Outcome:
    error: str
    """"" if there was none."""
    batches: list[int]
    """Trained on, in their order, as steps counted without a roll back."""
    tensors: dict[str, torch.Tensor]
    """Weights, buffers and optimizer state at the end; this rank's parts."""
    rolled_back: dict[str, torch.Tensor]
    """After the last roll back."""


def train(
    folder: Path, data: Path, poisons: Sequence[Poison], *more: str, ranks: int = 1
) -> list[Outcome]:
    """Train, or go on; the outcome of each rank."""
    folder.mkdir(exist_ok=True)
    small = ["parallel.ep=1", "train.eval_every_steps=0", "metrics.peak_tflops=1", *more]
    arguments = overrides(folder, data, *small)
    return run_ranks(_train, ranks, arguments, list(poisons), timeout_s=240)


def _train(rank: int, size: int, arguments: list[str], poisons: list[Poison]) -> Outcome:
    config = compose(arguments)
    process = Process(
        rank=rank, world_size=size, local_rank=rank, device=torch.device("cpu"), backend="gloo"
    )
    process = replace(process, nodes=tuple(f"node{r}" for r in range(size)))
    trainer = Trainer(build_run(config, process))
    batches = poison(trainer, poisons)
    error, rolled_back, roll_back = "", {}, trainer._roll_back

    def watched_roll_back() -> bool:
        has_rolled_back = roll_back()
        rolled_back.update(tensors_of(trainer))
        return has_rolled_back

    trainer._roll_back = watched_roll_back  # type: ignore[method-assign]
    try:
        with StopRequest() as stop:
            trainer.train(stop)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return Outcome(error, batches, tensors_of(trainer), rolled_back)


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of this rank's parts of all that a checkpoint holds."""
    tensors = run_tensors(trainer.run.model, trainer.run.optimizer)
    return {name: local_tensor(tensor.detach()).clone() for name, tensor in tensors.items()}


def poison(trainer: Trainer, poisons: Sequence[Poison]) -> list[int]:
    """Poison a trainer's batches; the list grows with each step."""
    loader, last = trainer.run.loader, trainer.run.parallel.parts[-1]
    batches: list[int] = []
    read, cross_entropy_sum = loader.step_at, last.cross_entropy_sum

    is_second = False

    def current(kind: str) -> float | None:
        for known in poisons:
            is_meant = known.again or not is_second
            if known.step == batches[-1] and known.kind == kind and is_meant:
                return known.factor
        return None

    def step_at(first_sample: int):
        nonlocal is_second
        is_second = first_sample < loader.consumed_samples
        batches.append(first_sample // BATCH + 1)
        if current("die") is not None:
            raise RuntimeError("the run dies here")
        return read(first_sample)

    def poisoned_sum(logits_TV, targets_T):
        total = cross_entropy_sum(logits_TV, targets_T)
        if last.training:
            of_gradient, of_loss = current("gradient"), current("loss")
            if of_gradient is not None:
                total.register_hook(lambda gradient: gradient * of_gradient)
            if of_loss is not None:
                total = total * of_loss
        return total

    loader.step_at = step_at
    last.cross_entropy_sum = poisoned_sum
    return batches
