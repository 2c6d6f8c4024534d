"""Steps of several variants of one training in one job, in turns: what speed.py runs as every rank of a fabric.

Each variant is a run of its own, built from a configuration as `moesys train` builds it; a round is a step of each. Rank 0
prints a line of JSON for every variant and round; the last step of a variant's last round is profiled, and not timed.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.compression.speed import STAYING
from moesys.config.compose import compose
from moesys.config.schema import RunConfig
from moesys.config.validate import check
from moesys.moe.codecs.clusters import ClusterCode
from moesys.moe.dispatch import ExpertParallelDispatcher
from moesys.parallel.bootstrap import Process, process_group
from moesys.parallel.dims import parallel_dims
from moesys.parallel.exchange import FlatExchange, Route
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.train.beginning import begin
from moesys.train.setup import build_run
from moesys.train.state import run_tensors
from moesys.train.step import TrainStep
from moesys.train.timing import SectionTimer

CODEC = "codec"
CODEC_OPS = {
    CODEC,
    "moesys::cross_polytope",
    "moesys::member_means",
    "moesys::restore",
    "moesys::restore_backward",
    "moesys::pack",
    "moesys::unpack",
    "GeneratedBackwardFor_moesys_member_means_defaultBackward",
    "GeneratedBackwardFor_moesys_restore_defaultBackward",
}
"""With what is planned, encoded and decoded, all that a codec and the wire add to a step."""


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

    def step(self) -> Any:
        batches = self.run.loader.next_step()
        self.steps += 1
        return self.train_step(batches, self.lr, step=self.steps)

    def measure(self) -> dict[str, Any]:
        """A step, in milliseconds and bytes."""
        dist.barrier()
        began = time.perf_counter()
        result = self.step()
        took_ms = (time.perf_counter() - began) * 1e3
        rows, slots = sum(result.coded_rows_M), sum(map(sum, result.expert_load_ME))
        return {
            "variant": self.name,
            "step_ms": took_ms,
            "between_nodes_bytes": result.between_nodes_bytes,
            "rows": rows / slots if rows else 1.0,
        }

    def codec_ms(self) -> float:
        """Of one step, mean over ranks: hashing, ordering, means, restoring, few bits, forward and backward."""
        self._name_codecs()
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.step()
        own_us = sum(
            event.cpu_time_total for event in (profiled.events() or []) if _is_of_codec(event)
        )
        told = torch.tensor([own_us / 1e3], dtype=torch.float64)
        dist.all_reduce(told)
        return told.item() / dist.get_world_size()

    def _name_codecs(self) -> None:
        """What they do is an event of the profile."""
        for layer in self.run.model.moe_layers():
            codec: Any = layer.compression.codec
            if codec is not None:
                codec.plan = _named(codec.plan)
        ClusterCode.encode, ClusterCode.decode = (
            _named(ClusterCode.encode),
            _named(ClusterCode.decode),
        )


def build_variants(variants: Mapping[str, Sequence[str]], process: Process) -> list[Variant]:
    """All on the same process groups, a thread of which wakes a hundred times a second on gloo. Collective."""
    configs = {name: compose(overrides) for name, overrides in variants.items()}
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    for config in configs.values():
        check(config, process.world_size, per_node)
    first = next(iter(configs.values()))
    dims = parallel_dims(first.parallel, process.world_size)
    meshes = build_meshes(dims, process.device.type, per_node, cuts_by_node=True)
    built = [Variant(name, config, process, meshes) for name, config in configs.items()]
    for variant in built:
        if variant.name == STAYING:
            for layer in variant.run.model.moe_layers():
                assert isinstance(layer.dispatcher, ExpertParallelDispatcher)
                layer.dispatcher.exchange = StayingRows(meshes.ep_group, per_node)
    return built


def _named(function: Any) -> Any:
    def named(*arguments: Any) -> Any:
        with record_function(CODEC):
            return function(*arguments)

    return named


def _is_of_codec(event: Any) -> bool:
    """And not within another that is."""
    if event.name not in CODEC_OPS:
        return False
    parent = event.cpu_parent
    while parent is not None:
        if parent.name in CODEC_OPS:
            return False
        parent = parent.cpu_parent
    return True


def main(variants: dict[str, list[str]], rounds: int) -> None:
    """A step of each comes first, and is not told."""
    with process_group("cpu", timeout_s=600.0) as process:
        built = build_variants(variants, process)
        for variant in built:
            variant.measure()
        for number in range(rounds):
            for variant in built:
                found = variant.measure()
                if number == rounds - 1:
                    found["codec_ms"] = variant.codec_ms()
                if process.rank == 0:
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
