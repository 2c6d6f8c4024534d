"""Bytes that the ranks of a run send in one step: counted while a small model trains, and by formula. No benchmark itself."""

from collections import defaultdict
from fractions import Fraction
from typing import Any

import torch

from moesys.config.schema import RunConfig
from moesys.models.transformer import MoEBlock
from moesys.parallel.dims import ParallelDims, parallel_dims
from moesys.parallelize.schedules import action_table
from moesys.plan.communication import CommunicationCase, communication
from moesys.plan.pipeline import layers_of_stages
from moesys.plan.rows import RowsSent, rows_sent, rows_sent_once
from moesys.profile.traffic import TrafficCounter
from moesys.testing.small_run import SmallRun

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
Routing = dict[int, list[list[list[int]]]]
"""Of each MoE layer, the ids of each micro-step's tokens, [T][K]."""


def count_step(run: SmallRun) -> tuple[ByGroup, Routing]:
    """Train a step; what this rank sent, and what its routers decided. Not the first step, which sets things up."""
    routing: Routing = defaultdict(list)
    kept: list[tuple[Any, Any]] = []
    for name, block in run.model.layers.items():
        if isinstance(block, MoEBlock):
            kept.append((block.moe.dispatcher, block.moe.dispatcher.plan))
            _note(block.moe.dispatcher, routing[int(name)])
    with TrafficCounter() as counter:
        run.step()
    for dispatcher, plan in kept:
        dispatcher.plan = plan
    sent = {key: traffic.bytes for key, traffic in counter.sent.items() if traffic.bytes}
    return sent, dict(routing)


def _note(dispatcher: Any, found: list[list[list[int]]]) -> None:
    plan = dispatcher.plan

    def noting(topk_ids_TK: torch.Tensor, *args: Any) -> Any:
        found.append(topk_ids_TK.tolist())
        return plan(topk_ids_TK, *args)

    dispatcher.plan = noting


def count(rank: int, world_size: int, config: RunConfig) -> tuple[ByGroup, Routing]:
    """`count_step` of a second step, as run_ranks calls it."""
    run = SmallRun(config, world_size)
    run.step()
    return count_step(run)


def formula(
    config: RunConfig, world_size: int, rank: int, routing: list[Routing], state_dim: int = 0
) -> ByGroup:
    """What plan.communication says of a rank, given all ranks' routing. Groups of the same ranks are one."""
    dims = parallel_dims(config.parallel, world_size)
    at = dims.coordinates(rank)
    case = CommunicationCase(
        config=config,
        axes=dims.dense_axes | dims.expert_axes,
        at=at,
        stages=layers_of_stages(config.model, config.parallel, config.data.seq_len),
        orders=_orders(config, dims, at["pp"]) if dims.pp > 1 else None,
        state_dim=state_dim,
    )
    found: ByGroup = defaultdict(Fraction)
    for sent in communication(case, _rows(case, dims, rank, routing)):
        found[_ranks(case, dims, rank, sent.group), sent.kind] += sent.bytes
    return dict(found)


def _ranks(case: CommunicationCase, dims: ParallelDims, rank: int, group: str) -> tuple[int, ...]:
    if group == "ends":
        pipeline = dims.group_of(rank, "pp")
        return pipeline[0], pipeline[-1]
    if group in ("ep_node", "ep_rail"):
        ranks, inside = dims.group_of(rank, "ep"), case.ep_per_node
        node, place = divmod(ranks.index(rank), inside)
        own = (
            slice(node * inside, (node + 1) * inside)
            if group == "ep_node"
            else slice(place, None, inside)
        )
        return tuple(ranks[own])
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


def _rows(
    case: CommunicationCase, dims: ParallelDims, rank: int, routing: list[Routing]
) -> list[RowsSent]:
    if dims.ep * dims.etp == 1:
        return []
    at, model, exchange = dims.coordinates(rank), case.config.model, case.config.dispatch.exchange
    members = torch.tensor(dims.group_of(rank, "ep", "etp")).view(dims.ep, dims.etp).tolist()
    num_classes, found = len(model.moe.widths), []
    for layer, steps in routing[rank].items():
        num_experts = model.moe_of(layer).num_experts
        for i in range(len(steps)):
            ids = [[routing[r][layer][i] for r in ranks] for ranks in members]
            slots = [[_slots(of_rank, num_experts) for of_rank in ranks] for ranks in ids]
            where = at["ep"], at["etp"], num_classes
            if exchange == "deduplicated":
                found.append(rows_sent_once(ids, slots, *where, case.ep_per_node))
            else:
                per_node = case.ep_per_node if exchange == "hierarchical" else None
                found.append(rows_sent(slots, *where, per_node))
    return found


def _slots(ids: list[list[int]], num_experts: int) -> list[int]:
    counts = [0] * num_experts
    for expert in (expert for token in ids for expert in token if expert >= 0):
        counts[expert] += 1
    return counts
