"""Several variants of one training in one job, which take turns: each is a run of its own, built from a configuration as `moesys train`
builds it, a step at a time.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.shaping import STAYING
from moesys.config.compose import compose
from moesys.config.schema import RunConfig
from moesys.config.validate import check
from moesys.data.loader import MicroBatch
from moesys.data.step_batch import StepBatch
from moesys.moe.dispatch import ExpertParallelDispatcher
from moesys.parallel.bootstrap import Process
from moesys.parallel.dims import parallel_dims
from moesys.parallel.exchange import FlatExchange, Route
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.train.beginning import begin
from moesys.train.setup import build_run
from moesys.train.state import run_tensors
from moesys.train.step import StepResult, TrainStep
from moesys.train.timing import SectionTimer


class StayingRows(FlatExchange):
    """Gives a rank as many rows as would come to it, of its own: none travels."""

    def send(self, rows_ND: Tensor, route: Route, plain_row_bytes: int | None = None) -> Tensor:
        if rows_ND.shape[0] == 0:
            return rows_ND.new_zeros(route.num_arrivals, *rows_ND.shape[1:])
        places = torch.arange(route.num_arrivals, device=rows_ND.device)
        return rows_ND[places % rows_ND.shape[0]]


class Variant:
    """One run of the job."""

    def __init__(self, name: str, config: RunConfig, process: Process, meshes: Meshes) -> None:
        self.name, self.lr, self.steps = name, config.optim.lr, 0
        self.run = run = build_run(config, process, meshes=meshes)
        begin(config.checkpoint, run.folder, run_tensors(run.model, run.optimizer))
        set_expert_backend(run.model, "loop")
        self.train_step = TrainStep(
            run.parallel, run.optimizer, run.meshes, config, SectionTimer(process.device)
        )

    def step(self) -> StepResult:
        return self.train(self.read())

    def read(self) -> StepBatch | Sequence[MicroBatch]:
        """This rank's part of the next step."""
        return self.run.loader.next_step()

    def train(self, batch: StepBatch | Sequence[MicroBatch]) -> StepResult:
        self.steps += 1
        return self.train_step(batch, self.lr, step=self.steps)

    def timed_step(self) -> tuple[StepResult, float]:
        """And how many milliseconds it took this rank, from when all are ready."""
        dist.barrier()
        began = time.perf_counter()
        result = self.step()
        return result, (time.perf_counter() - began) * 1e3


V = TypeVar("V", bound=Variant)


def build_variants(
    variants: Mapping[str, Sequence[str]], process: Process, kind: type[V]
) -> list[V]:
    """All on the same process groups, a thread of which wakes a hundred times a second on gloo. Collective."""
    configs = {name: compose(overrides) for name, overrides in variants.items()}
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    for config in configs.values():
        check(config, process.world_size, per_node)
    first = next(iter(configs.values()))
    meshes = build_meshes(
        parallel_dims(first.parallel, process.world_size),
        process.device.type,
        per_node,
        cuts_by_node=any(one.dispatch.exchange != "flat" for one in configs.values()),
        has_copies=any(one.placement.makes_copies for one in configs.values()),
    )
    without_copies = replace(meshes, copies_group=None)
    built = [
        kind(name, config, process, meshes if config.placement.makes_copies else without_copies)
        for name, config in configs.items()
    ]
    for variant in built:
        if variant.name == STAYING:
            for layer in variant.run.model.moe_layers():
                assert isinstance(layer.dispatcher, ExpertParallelDispatcher)
                layer.dispatcher.exchange = StayingRows(meshes.ep_group, per_node)
    return built
