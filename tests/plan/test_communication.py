"""Bytes counted on every rank are the formula's, exactly, by group and kind of call, in a step under each layout."""

from dataclasses import replace

import pytest

from benchmarks.traffic import count, formula
from moesys.config.dispatch_schema import DispatchConfig, WireConfig
from moesys.config.schema import (
    BalanceConfig,
    ComponentConfig,
    MemoryLayersConfig,
    ParallelConfig,
    RunConfig,
)
from moesys.plan.parameters import Parameter
from moesys.testing.layouts import BASE, LAYOUTS
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import with_micro_steps
from tests.train.recurrent_router import RecurrentRouter

MICRO_STEPS = 4


def assert_counted(config: RunConfig, world_size: int) -> None:
    config = with_micro_steps(config, world_size, MICRO_STEPS)
    ranks = run_ranks(count, world_size, config)
    for rank, (counted, _) in enumerate(ranks):
        expected = formula(config, world_size, rank, [slots for _, slots in ranks])
        assert counted == expected, f"rank {rank}"


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
    dispatch = changes.get("dispatch", config.dispatch)
    return replace(config, model=model, train=train, dispatch=dispatch)


def balance(level: str) -> BalanceConfig:
    changes = {"global_loss_coef": 0.0, f"{level}_loss_coef": 0.01}
    return replace(BASE.model.moe.balance, **changes)


PYRAMID = {"num_experts": 12, "experts_by_layer": (4, 12, 8)}
WIDTHS = {"expert_widths": (8, 40)}
FEW_BITS = DispatchConfig(
    wire=WireConfig(
        dispatch_forward="int8",
        dispatch_backward="e5m2",
        combine_forward="e4m3",
        combine_backward="int4",
        block=6,
    )
)
ONE_WAY = DispatchConfig(wire=WireConfig(combine_backward="int8"))
MEMORY = MemoryLayersConfig(layers=(2,), num_keys=8, top_k=3, d_key=8, d_value=16, d_pre=4, heads=2)
VARIANTS = [
    ("ep", {"memory_layers": MEMORY}),
    ("ep", {"memory_layers": replace(MEMORY, d_pre=0, layers=(1, 3)), "recompute": "layer"}),
    ("tp+ep", {"memory_layers": MEMORY, "dtype": "bf16", "recompute": "layer"}),
    ("tp without sequence parallelism", {"memory_layers": MEMORY, "dtype": "bf16"}),
    ("tp without sequence parallelism", {"memory_layers": MEMORY, "recompute": "layer"}),
    ("zero", {"memory_layers": MEMORY}),
    ("pp+tp+ep+zero", {"memory_layers": MEMORY, "recompute": "moe"}),
    ("tp", {"dtype": "bf16"}),
    ("tp", {"recompute": "layer"}),
    ("tp", {"recompute": "attention"}),
    ("tp", {"tie_embeddings": True}),
    ("tp", {"attention_experts": 3}),
    ("tp", {"attention_experts": 3, "recompute": "layer"}),
    ("tp", {"attention_experts": 2, "attention_experts_kv": "shared", "recompute": "attention"}),
    ("tp without sequence parallelism", {"attention_experts": 3, "recompute": "layer"}),
    ("cp", {"attention_experts": 3, "recompute": "attention"}),
    ("tp+ulysses", {"attention_experts": 2, "attention_experts_kv": "shared"}),
    ("zero", {"attention_experts": 3}),
    ("zero", {"share_depth": "all"}),
    ("zero", {"share_depth": "moe", "recompute": "layer"}),
    ("zero 2", {"share_depth": "all"}),
    ("pp", {"share_depth": "all"}),
    ("zbv", {"share_depth": "moe"}),
    ("four stages", {"share_depth": "all"}),
    ("pp+zero", {"share_depth": "all"}),
    ("pp+zero", {"share_depth": "all", "num_dense_layers": 2}),
    ("pp+tp+ep+zero", {"share_depth": "all", "tie_embeddings": True}),
    ("tp+ep without sequence parallelism", {"share_depth": "all"}),
    ("tp", {"balance": balance("sequence")}),
    ("tp without sequence parallelism", {"dtype": "bf16"}),
    ("tp without sequence parallelism", {"recompute": "layer"}),
    ("zero", {"recompute": "layer"}),
    ("zero", {"tie_embeddings": True}),
    ("pp", {"tie_embeddings": True}),
    ("four stages", {"tie_embeddings": True}),
    ("pp+zero", {"tie_embeddings": True}),
    ("zbv", {"tie_embeddings": True}),
    ("cp", {"dtype": "bf16", "recompute": "attention"}),
    ("cp", {"balance": balance("micro")}),
    ("ulysses", {"dtype": "bf16", "recompute": "selective"}),
    ("ep", {"dtype": "bf16", "recompute": "moe"}),
    ("ep", {"capacity_factor": 2.0, "capacity_policy": "drop"}),
    ("ep", {"d_latent": 12, "shared_gate": "softmax"}),
    ("tp+etp", {"d_latent": 12, "dtype": "bf16", "shared_gate": "sigmoid"}),
    ("pp+zero", {"d_latent": 12, "shared_gate": "softmax"}),
    ("ep", {"balance": replace(balance("micro"), device_loss_coef=0.1, device_groups=2)}),
    ("cp", {"balance": replace(balance("sequence"), global_loss_coef=0.1, micro_loss_coef=0.1)}),
    ("cp+ep", {"recompute": "layer"}),
    ("etp", {"dtype": "bf16", "recompute": "layer"}),
    ("ep", {"dispatch": FEW_BITS}),
    ("ep", {"dispatch": FEW_BITS, "recompute": "layer", "dtype": "bf16"}),
    ("etp", {"dispatch": FEW_BITS, "d_latent": 12}),
    ("ep", {"dispatch": ONE_WAY, "capacity_factor": 2.0}),
    ("pp", {"dtype": "bf16"}),
    ("pp+tp+ep", PYRAMID | {"balance": balance("micro")}),
    ("ep", PYRAMID | {"recompute": "layer"}),
    ("etp", PYRAMID),
    ("ep", WIDTHS | {"balance": balance("width")}),
    ("cp+ep", WIDTHS | {"recompute": "layer"}),
    ("tp+etp", WIDTHS | {"dtype": "bf16"}),
    ("zero 2", WIDTHS),
    ("tp", {"mtp_depth": 2}),
    ("tp+ep", {"mtp_depth": 1, "recompute": "layer"}),
    ("tp without sequence parallelism", {"mtp_depth": 1, "tie_embeddings": True}),
    ("pp+tp+ep", {"mtp_depth": 1}),
    ("zbv", {"mtp_depth": 2}),
    ("zero", {"mtp_depth": 2}),
    ("pp+zero", {"mtp_depth": 1}),
    ("cp", {"mtp_depth": 1}),
]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_options_change_the_bytes_as_the_formulas_say(name, changes):
    world_size, config = layout(name)
    assert_counted(changed(config, **changes), world_size)


EXCHANGES = [
    (4, {"ep": 4}, {}),
    (4, {"ep": 4}, {"recompute": "layer", "dtype": "bf16"}),
    (4, {"ep": 4}, {"dispatch": FEW_BITS}),
    (4, {"ep": 4}, {"dispatch": FEW_BITS, "recompute": "layer"}),
    (4, {"ep": 4}, WIDTHS),
    (8, {"ep": 4, "etp": 2, "tp": 2}, {"recompute": "moe"}),
    (8, {"ep": 4, "pp": 2}, {"d_latent": 12}),
    (4, {"ep": 4, "tp": 2}, PYRAMID),
    (4, {"ep": 2}, {}),
]


@pytest.mark.parametrize("exchange", ["hierarchical", "deduplicated"])
@pytest.mark.parametrize(
    ("world_size", "degrees", "changes"),
    [c if c == EXCHANGES[0] else pytest.param(*c, marks=pytest.mark.parity) for c in EXCHANGES],
    ids=str,
)
def test_bytes_by_way_of_nodes(exchange, world_size, degrees, changes):
    config = changed(replace(BASE, parallel=ParallelConfig(**degrees)), **changes)
    per_node = 4 if "etp" in degrees else 2
    dispatch = replace(config.dispatch, exchange=exchange, ranks_per_node=per_node)
    assert_counted(replace(config, dispatch=dispatch), world_size)


@pytest.mark.parity
def test_padded_rows_in_two_steps():
    config = changed(BASE, capacity_factor=4.0, capacity_policy="pad")
    dispatch = DispatchConfig(exchange="hierarchical", ranks_per_node=2)
    config = replace(config, parallel=ParallelConfig(ep=4), dispatch=dispatch)
    config = with_micro_steps(config, 4, MICRO_STEPS)
    ranks = run_ranks(count, 4, config)
    for rank, (counted, _) in enumerate(ranks):
        expected = formula(config, 4, rank, [routing for _, routing in ranks])
        assert counted.keys() == expected.keys(), "no count is told"


@pytest.mark.parity
def test_a_routers_state_travels_with_the_hidden_states():
    """Those of all tokens, the state of a rank's own. (Its router's parameters are not in the formulas.)"""
    router = ComponentConfig(target="tests.train.recurrent_router.RecurrentRouter")
    config = replace(
        changed(BASE, router=router),
        parallel=ParallelConfig(pp=2, tp=2, sequence_parallel=False),
    )
    config = with_micro_steps(config, 4, MICRO_STEPS)
    ranks = run_ranks(count, 4, config)
    for rank, (counted, _) in enumerate(ranks):
        expected = formula(
            config, 4, rank, [slots for _, slots in ranks], RecurrentRouter.state_dim
        )
        sends = [(key, nbytes) for key, nbytes in counted.items() if key[1] == "send"]
        assert sends == [(key, nbytes) for key, nbytes in expected.items() if key[1] == "send"]
        assert len(sends) == 1


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
