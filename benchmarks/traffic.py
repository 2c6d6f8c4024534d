"""Bytes that the ranks of a run send in one step: counted while a small model trains, and by formula. No benchmark itself."""

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from moesys.config.schema import RunConfig
from moesys.models.transformer import MoEBlock
from moesys.optim.build import build_optimizer
from moesys.parallel.dims import ParallelDims, parallel_dims
from moesys.parallel.mesh import build_meshes
from moesys.parallelize.build import build_parallel_model
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.parallelize.schedules import action_table
from moesys.plan.communication import CommunicationCase, RowsSent, communication, rows_sent
from moesys.plan.pipeline import layers_of_stages
from moesys.profile.traffic import TrafficCounter
from moesys.testing.parity import samples_of_step
from moesys.train.step import TrainStep
from moesys.train.timing import SectionTimer

AXES = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "ep": ("ep",),
    "etp": ("etp",),
    "shard": ("dp_shard", "cp"),
    "dp_replicate": ("dp_replicate",),
    "edp_shard": ("edp_shard",),
    "edp_replicate": ("edp_replicate",),
    "edp": ("edp_replicate", "edp_shard"),
    "sequence": ("cp", "tp"),
    "replica": ("dp_replicate", "dp_shard", "cp"),
    "stage": ("dp_replicate", "dp_shard", "cp", "tp"),
    "world": ("pp", "dp_replicate", "dp_shard", "cp", "tp"),
}
"""The groups that formulas name, by the axes along which their ranks differ."""

ByGroup = dict[tuple[tuple[int, ...], str], Fraction]
"""Bytes by the group's ranks and the kind of call."""
Slots = dict[int, list[list[int]]]
"""Of each MoE layer, slots per expert of each micro-step."""


class SmallRun:
    """A rank of a run on the CPU, with batches of its own making. Collective."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        self.config = config
        self.dims = parallel_dims(config.parallel, world_size)
        device = torch.device("cpu")
        self.meshes = build_meshes(self.dims, device.type)
        parallel = build_parallel_model(config, self.meshes, device)
        self.model = parallel.whole
        set_expert_backend(self.model, "loop")
        optimizer = build_optimizer(self.model, config.optim)
        self.train_step = TrainStep(parallel, optimizer, self.meshes, config, SectionTimer(device))
        self.steps = 0

    def step(self) -> None:
        """Train one step."""
        batches = samples_of_step(
            self.config,
            self.steps,
            self.meshes.dp_rank,
            self.dims.dp,
            self.config.train.micro_steps(self.dims.dp),
        )
        self.train_step(batches, self.config.optim.lr)
        self.steps += 1

    def count(self) -> tuple[ByGroup, Slots]:
        """Train a step; what this rank sent, and what its routers decided. Not the first step, which sets things up."""
        slots: Slots = defaultdict(list)
        kept: list[tuple[Any, Any]] = []
        for name, block in self.model.layers.items():
            if isinstance(block, MoEBlock):
                kept.append((block.moe.dispatcher, block.moe.dispatcher.plan))
                _note(block.moe.dispatcher, slots[int(name)])
        with TrafficCounter() as counter:
            self.step()
        for dispatcher, plan in kept:
            dispatcher.plan = plan
        sent = {key: traffic.bytes for key, traffic in counter.sent.items() if traffic.bytes}
        return sent, dict(slots)


def _note(dispatcher: Any, found: list[list[int]]) -> None:
    plan = dispatcher.plan

    def noting(*args: Any) -> Any:
        made = plan(*args)
        found.append(made.slots_per_expert_E.tolist())
        return made

    dispatcher.plan = noting


def count(rank: int, world_size: int, config: RunConfig) -> tuple[ByGroup, Slots]:
    """`SmallRun.count` of a second step, as run_ranks calls it."""
    run = SmallRun(config, world_size)
    run.step()
    return run.count()


def with_micro_steps(config: RunConfig, world_size: int, steps: int) -> RunConfig:
    """The configuration whose data ranks take `steps` micro-steps."""
    dims = parallel_dims(config.parallel, world_size)
    tokens = config.train.global_batch_tokens // (steps * dims.dp)
    return replace(config, train=replace(config.train, micro_batch_tokens=tokens))


def formula(config: RunConfig, world_size: int, rank: int, slots: list[Slots]) -> ByGroup:
    """What plan.communication says of a rank, given all ranks' routing. Groups of the same ranks are one."""
    dims = parallel_dims(config.parallel, world_size)
    parallel, stages, orders = config.parallel, [[*range(config.model.num_layers)]], None
    at = dims.coordinates(rank)
    if dims.pp > 1:
        stages = layers_of_stages(config.model, parallel, config.data.seq_len)
        orders = _orders(config, dims, at["pp"])
    case = CommunicationCase(
        config=config,
        axes=dims.dense_axes | dims.expert_axes,
        at=at,
        stages=stages,
        orders=orders,
    )
    found: ByGroup = defaultdict(Fraction)
    for sent in communication(case, _rows(dims, rank, slots)):
        found[_ranks(dims, rank, sent.group), sent.kind] += sent.bytes
    return dict(found)


def _ranks(dims: ParallelDims, rank: int, group: str) -> tuple[int, ...]:
    if group == "ends":
        pipeline = dims.group_of(rank, "pp")
        return pipeline[0], pipeline[-1]
    return tuple(dims.group_of(rank, *AXES[group]))


def _orders(config: RunConfig, dims: ParallelDims, pp_rank: int) -> dict[int, str]:
    """Forwards and backwards of each stage of the rank, as its schedule runs them."""
    parallel, steps = config.parallel, config.train.micro_steps(dims.dp)
    table = action_table(parallel.pp_schedule, dims.pp, parallel.pp_virtual_stages, steps)
    orders: dict[int, str] = defaultdict(str)
    for action in table[pp_rank]:
        if action.kind != "W":
            orders[action.stage] += "F" if action.kind == "F" else "B"
    return orders


def _rows(dims: ParallelDims, rank: int, slots: list[Slots]) -> list[RowsSent]:
    if dims.ep * dims.etp == 1:
        return []
    at = dims.coordinates(rank)
    members = torch.tensor(dims.group_of(rank, "ep", "etp")).view(dims.ep, dims.etp).tolist()
    return [
        rows_sent([[slots[r][layer][i] for r in ranks] for ranks in members], at["ep"], at["etp"])
        for layer, found in slots[rank].items()
        for i in range(len(found))
    ]
