"""Any plan of sequences of any length trains with one process's numbers under every axis: losses, all gradients, counters.

The reference does in each micro-step what all ranks do in it, on one.
"""

from dataclasses import replace
from typing import Any

import pytest

from moesys.config.batch_schema import BatchConfig
from moesys.config.schema import (
    BalanceConfig,
    ComponentConfig,
    MemoryLayersConfig,
    ParallelConfig,
    Recompute,
    RunConfig,
)
from moesys.testing.layouts import BASE, LAYOUTS, MAX_ERROR, MAX_WEIGHT_ERROR, MICRO_STEPS
from moesys.testing.parity import Numbers, compare, parity
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, sequences_of_step, with_micro_steps
from moesys.train.step import StepResult

PIECES = replace(
    BASE,
    # With 7 one token's scores of two experts are equal but for rounding, with null experts in step 3.
    run=replace(BASE.run, seed=8),
    batch=BatchConfig(policy="hdp"),
    data=replace(BASE.data, seq_len=96),
    train=replace(BASE.train, global_batch_tokens=512, steps=4),
)
"""Steps of about a dozen sequences of 1 to 96 tokens; some rank has none in a micro-step, some only pass on others' keys."""
OVER_DATA_RANKS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks": (2, {}),
    "8 ranks": (8, {}),
    "dp+ep": (4, {"ep": 2}),
    "dp+ep over all": (8, {"ep": 8}),
    "dp+pp+tp": (8, {"pp": 2, "tp": 2}),
    "dp+tp+ep": (8, {"tp": 2, "ep": 4}),
    "dp+pp+ep": (8, {"pp": 2, "ep": 4}),
    "dp+tp without sequence parallelism": (4, {"tp": 2, "sequence_parallel": False}),
    "dp+etp": (4, {"etp": 2}),
    "dp+four stages": (8, {"pp": 4}),
    **{
        f"dp+{name}": (2 * LAYOUTS[name][0], LAYOUTS[name][1])
        for name in ("zbv", "dualpipev", "interleaved", "interleaved_zero_bubble", "gpipe")
    },
    **{name: LAYOUTS[name] for name in ("zero", "zero 1", "zero 2", "experts over two copies")},
    **{name: LAYOUTS[name] for name in ("two copies of two shards", "pp+tp+ep+zero")},
    "tp+ep without sequence parallelism": LAYOUTS["tp+ep without sequence parallelism"],
}
QUICK = ("dp+ep", "dp+pp+tp")


@pytest.fixture(scope="module")
def one_process() -> Numbers:
    return parity(PIECES, 1, MICRO_STEPS)[0]


def assert_as_one(config: RunConfig, layout: str, reference: Numbers | None = None) -> None:
    world_size, degrees = OVER_DATA_RANKS[layout]
    reference = reference or parity(config, 1, MICRO_STEPS)[0]
    found = parity(replace(config, parallel=ParallelConfig(**degrees)), world_size, MICRO_STEPS)
    difference = compare(found, reference)
    assert difference.worst < MAX_ERROR, difference
    assert difference.weights < MAX_WEIGHT_ERROR, difference


def marked(name: str) -> Any:
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.parity)


@pytest.mark.parametrize("layout", [marked(name) for name in OVER_DATA_RANKS])
def test_layout(one_process: Numbers, layout: str) -> None:
    assert_as_one(PIECES, layout, one_process)


MODELS: dict[str, dict[str, Any]] = {
    "multi-token prediction": {"mtp_depth": 2},
    "memory": {
        "memory_layers": MemoryLayersConfig(
            layers=(2,), num_keys=8, top_k=3, d_key=8, d_value=16, d_pre=4, rank=2, heads=2
        )
    },
    "attention experts": {"attention_experts": 2},
    "what layers share": {"share_depth": "all", "num_dense_layers": 0},
    "tied": {"tie_embeddings": True},
    "capacity": {"moe": replace(PIECES.model.moe, capacity_factor=8.0)},
    "padded": {"moe": replace(PIECES.model.moe, capacity_factor=8.0, capacity_policy="pad")},
    "null experts": {"moe": replace(PIECES.model.moe, zero_experts=1, constant_experts=2)},
    "a router's state": {
        "moe": replace(
            PIECES.model.moe,
            router=ComponentConfig(target="tests.train.recurrent_router.RecurrentRouter"),
        )
    },
}
"""Keys of model."""


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, layout) for name in MODELS for layout in ("dp+ep", "dp+pp+tp", "dp+zbv")),
        *(("memory", layout) for layout in ("dp+tp+ep", "dp+pp+ep", "pp+tp+ep+zero")),
        *((name, "tp+ep without sequence parallelism") for name in ("memory", "padded")),
        ("padded", "dp+etp"),
    ],
)
@pytest.mark.parity
def test_model(name: str, layout: str) -> None:
    assert_as_one(replace(PIECES, model=replace(PIECES.model, **MODELS[name])), layout)


SEQUENCE_LOSS = replace(
    PIECES,
    model=replace(
        PIECES.model,
        moe=replace(PIECES.model.moe, balance=BalanceConfig(sequence_loss_coef=0.1)),
    ),
)
"""Of which ranks without a piece in common have nothing to wait for."""


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        (layout, recompute)
        if (layout, recompute) == ("dp+tp without sequence parallelism", "layer")
        else pytest.param(layout, recompute, marks=pytest.mark.parity)
        for recompute in ("none", "layer")
        for layout in (
            *("2 ranks", "8 ranks", "dp+ep", "dp+tp+ep", "dp+pp+tp", "zero", "dp+dualpipev"),
            *("dp+tp without sequence parallelism", "dp+etp", "pp+tp+ep+zero"),
        )
    ],
)
def test_balance_of_each_sequence(layout: str, recompute: Recompute) -> None:
    train = replace(SEQUENCE_LOSS.train, recompute=recompute)
    assert_as_one(replace(SEQUENCE_LOSS, train=train), layout)


def _without_empty(rank: int, size: int, config: RunConfig) -> tuple[list[int], list[StepResult]]:
    """Micro-steps, and the results, of steps in which a rank leaves out what it has no piece of."""
    run = SmallRun(with_micro_steps(config, size, MICRO_STEPS), size)
    numbers, results = [], []
    for step in range(config.train.steps):
        batch = sequences_of_step(run.config, step, run.meshes.dp_rank, run.dims.dp)
        own = [b for b in batch.micro_batches if b.pieces is not None and b.pieces.pieces]
        numbers.append(len(own))
        results.append(run.train_step(replace(batch, micro_batches=own), lr=1e-3, step=step + 1))
    return numbers, results


@pytest.mark.parity
def test_balance_of_each_sequence_waits_for_those_alone_that_share_it() -> None:
    """So ranks may have different numbers of micro-steps."""
    expected = parity(SEQUENCE_LOSS, 8, MICRO_STEPS)[0].results
    found = run_ranks(_without_empty, 8, SEQUENCE_LOSS)
    assert len({sum(numbers) for numbers, _ in found}) > 1
    for _, results in found:
        for ours, theirs in zip(results, expected, strict=True):
            assert (ours.loss, ours.balance_loss) == (theirs.loss, theirs.balance_loss)


@pytest.mark.parametrize("layout", ["dp+ep", "dp+pp+tp", "zero"])
@pytest.mark.parametrize("recompute", ["moe", "attention", "selective", "layer"])
@pytest.mark.parity
def test_recomputation(recompute: Any, layout: str) -> None:
    assert_as_one(replace(PIECES, train=replace(PIECES.train, recompute=recompute)), layout)


@pytest.mark.parity
def test_memories_are_read_again() -> None:
    config = replace(PIECES, train=replace(PIECES.train, recompute="layer"))
    assert_as_one(replace(config, model=replace(PIECES.model, **MODELS["memory"])), "dp+tp+ep")


@pytest.mark.parametrize("layout", ["8 ranks", "dp+ep", "dp+pp+tp"])
@pytest.mark.parity
def test_lengths_up_to_16384(layout: str) -> None:
    """One of them on all ranks, another of one token."""
    long = replace(
        PIECES,
        model=replace(PIECES.model, num_layers=2),
        data=replace(PIECES.data, seq_len=16_384),
        train=replace(PIECES.train, global_batch_tokens=32_768, steps=1),
    )
    assert_as_one(long, layout)
