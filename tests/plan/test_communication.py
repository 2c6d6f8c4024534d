"""Bytes counted on every rank are the formula's, exactly, by group and kind of call, in a step under each layout."""

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from moesys.config.schema import BalanceConfig, ParallelConfig, RunConfig
from moesys.optim.build import build_optimizer
from moesys.parallel.dims import ParallelDims, parallel_dims
from moesys.parallel.mesh import build_meshes
from moesys.parallelize.build import build_parallel_model
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.parallelize.pipeline import layers_of_stages
from moesys.parallelize.schedules import action_table
from moesys.plan.communication import CommunicationCase, RowsSent, communication, rows_sent
from moesys.plan.parameters import Parameter
from moesys.profile.traffic import TrafficCounter
from moesys.testing.parity import samples_of_step
from moesys.testing.ranks import run_ranks
from moesys.train.step import TrainStep
from moesys.train.timing import SectionTimer
from tests.train.test_layouts import BASE, LAYOUTS

MICRO_STEPS = 4
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

ByGroup = dict[tuple[tuple[int, ...], str], Fraction]
Slots = dict[int, list[list[int]]]
"""Of each MoE layer, slots per expert of each micro-step."""


def with_micro_batch(config: RunConfig, dims: ParallelDims) -> RunConfig:
    micro = config.train.global_batch_tokens // (MICRO_STEPS * dims.dp)
    return replace(config, train=replace(config.train, micro_batch_tokens=micro))


def count(rank: int, world_size: int, config: RunConfig) -> tuple[ByGroup, Slots]:
    """Of the second step: the first one sets things up."""
    dims = parallel_dims(config.parallel, world_size)
    config, meshes = with_micro_batch(config, dims), build_meshes(dims, "cpu")
    parallel = build_parallel_model(config, meshes, torch.device("cpu"))
    set_expert_backend(parallel.whole, "loop")
    optimizer = build_optimizer(parallel.whole, config.optim)
    step = TrainStep(parallel, optimizer, meshes, config, SectionTimer(torch.device("cpu")))
    batches = [samples_of_step(config, s, meshes.dp_rank, dims.dp, MICRO_STEPS) for s in (0, 1)]
    step(batches[0], config.optim.lr)
    slots: Slots = defaultdict(list)
    for name, block in parallel.whole.layers.items():
        if hasattr(block, "moe"):
            _note(block.moe.dispatcher, slots[int(name)])
    with TrafficCounter() as counter:
        step(batches[1], config.optim.lr)
    return {key: traffic.bytes for key, traffic in counter.sent.items()}, dict(slots)


def _note(dispatcher, found: list[list[int]]) -> None:
    plan = dispatcher.plan

    def noting(*args):
        made = plan(*args)
        found.append(made.slots_per_expert_E.tolist())
        return made

    dispatcher.plan = noting


def formula(config: RunConfig, dims: ParallelDims, rank: int, slots: list[Slots]) -> ByGroup:
    """By group of ranks and kind: groups of several names may be the same ranks."""
    config = with_micro_batch(config, dims)
    parallel, stages = config.parallel, [[*range(config.model.num_layers)]]
    orders = None
    if dims.pp > 1:
        stages = layers_of_stages(config.model, parallel, config.data.seq_len)
        orders = orders_of(config, dims, dims.coordinates(rank)["pp"])
    case = CommunicationCase(
        config=config,
        axes=dims.dense_axes | dims.expert_axes,
        at=dims.coordinates(rank),
        stages=stages,
        orders=orders,
    )
    rows = routed_rows(dims, rank, slots)
    found: ByGroup = defaultdict(Fraction)
    for sent in communication(case, rows):
        found[tuple(dims.group_of(rank, *AXES[sent.group])), sent.kind] += sent.bytes
    return dict(found)


def orders_of(config: RunConfig, dims: ParallelDims, pp_rank: int) -> dict[int, str]:
    parallel = config.parallel
    table = action_table(parallel.pp_schedule, dims.pp, parallel.pp_virtual_stages, MICRO_STEPS)
    orders: dict[int, str] = defaultdict(str)
    for action in table[pp_rank]:
        if action.kind != "W":
            orders[action.stage] += "F" if action.kind == "F" else "B"
    return orders


def routed_rows(dims: ParallelDims, rank: int, slots: list[Slots]) -> list[RowsSent]:
    if dims.ep * dims.etp == 1:
        return []
    at = dims.coordinates(rank)
    members = torch.tensor(dims.group_of(rank, "ep", "etp")).view(dims.ep, dims.etp).tolist()
    return [
        rows_sent(
            [[slots[r][layer][i] for r in over_etp] for over_etp in members], at["ep"], at["etp"]
        )
        for layer, found in slots[rank].items()
        for i in range(len(found))
    ]


def assert_counted(config: RunConfig, world_size: int) -> None:
    dims = parallel_dims(config.parallel, world_size)
    ranks = run_ranks(count, world_size, config)
    for rank, (counted, _) in enumerate(ranks):
        expected = formula(config, dims, rank, [slots for _, slots in ranks])
        assert {k: v for k, v in counted.items() if v} == expected, f"rank {rank}"


def layout(name: str) -> tuple[int, RunConfig]:
    world_size, degrees = LAYOUTS[name]
    return world_size, replace(BASE, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]


QUICK = ("zero", "etp", "pp")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.parity) for name in LAYOUTS],
)
def test_bytes_counted_are_the_formulas(name):
    world_size, config = layout(name)
    assert_counted(config, world_size)


def changed(config: RunConfig, **changes) -> RunConfig:
    """With keys of whatever section has them."""
    model, train = config.model, config.train
    moe = replace(model.moe, **{k: v for k, v in changes.items() if hasattr(model.moe, k)})
    model = replace(model, moe=moe, **{k: v for k, v in changes.items() if hasattr(model, k)})
    train = replace(train, **{k: v for k, v in changes.items() if hasattr(train, k)})
    return replace(config, model=model, train=train)


def balance(level: str) -> BalanceConfig:
    return replace(BASE.model.moe.balance, aux_loss_level=level)  # type: ignore[arg-type]


VARIANTS = [
    ("tp", {"dtype": "bf16"}),
    ("tp", {"recompute": "layer"}),
    ("tp", {"tie_embeddings": True}),
    ("tp", {"balance": balance("sequence")}),
    ("tp without sequence parallelism", {"dtype": "bf16"}),
    ("tp without sequence parallelism", {"recompute": "layer"}),
    ("zero", {"recompute": "layer"}),
    ("zero", {"tie_embeddings": True}),
    ("cp", {"dtype": "bf16", "recompute": "attention"}),
    ("cp", {"balance": balance("micro")}),
    ("ulysses", {"dtype": "bf16", "recompute": "selective"}),
    ("ep", {"dtype": "bf16", "recompute": "moe"}),
    ("ep", {"capacity_factor": 2.0, "capacity_policy": "drop"}),
    ("cp+ep", {"recompute": "layer"}),
    ("etp", {"dtype": "bf16", "recompute": "layer"}),
    ("pp", {"dtype": "bf16"}),
]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_options_change_the_bytes_as_the_formulas_say(name, changes):
    world_size, config = layout(name)
    assert_counted(changed(config, **changes), world_size)


@pytest.mark.parity
def test_shards_that_do_not_come_out_even_are_padded():
    """Three ranks share out matrices of 32 and 64 rows; with tp=2 they sum what they have, unpadded."""
    train = replace(BASE.train, global_batch_tokens=12 * BASE.data.seq_len)
    config = replace(BASE, train=train, parallel=ParallelConfig(zero=3))
    assert_counted(config, 3)
    assert_counted(replace(config, parallel=ParallelConfig(zero=1, tp=2)), 6)


def test_a_shard_as_it_travels_and_as_a_rank_has_it():
    uneven = Parameter(shape=(10, 3))
    assert uneven.padded_shard(4) == 3 * 3
    assert [uneven.shard_of(rank, 4) for rank in range(4)] == [9, 9, 9, 3]
    assert Parameter(shape=(3, 8)).shard_dim(4) == 1
    assert Parameter(shape=(3, 8), cut_dims=frozenset({1})).shard_dim(4) == 0
    assert [Parameter(shape=(2,)).shard_of(rank, 4) for rank in range(4)] == [1, 1, 0, 0]


def test_rows_of_a_routing_by_hand():
    """Two ep ranks of two experts each, two slices of each expert."""
    slots = [[[1, 2, 3, 4], [5, 0, 0, 1]], [[0, 7, 1, 1], [2, 2, 2, 2]]]
    assert rows_sent(slots, 0, 0) == RowsSent(
        dispatched=3 + 4,
        returned=0 + 7,
        copied=(1 + 2) + (0 + 7),
        partial=(5 + 0) + (2 + 2),
    )
    assert rows_sent([[[1, 2, 3, 4]]], 0, 0) == RowsSent(0, 0, 0, 0)
