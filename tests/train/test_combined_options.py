"""Many options at once, drawn at random, train with one process's numbers: what no list of pairs has thought of.

Every axis with every option of routers, balance, recomputation, ties and masks that the rules let through; two steps,
gradients accumulated over 4 micro-steps. A seed that fails goes on failing: it draws the same configurations.
"""

import random
from dataclasses import replace

import pytest

from moesys.config.layout import dims_or_none, find_layout_problems
from moesys.config.pipeline import find_pipeline_problems
from moesys.config.schema import BalanceConfig, ComponentConfig, ParallelConfig, RunConfig
from moesys.plan.pipeline import SCHEDULES
from moesys.testing.layouts import BASE, MAX_ERROR, MAX_WEIGHT_ERROR, MICRO_STEPS
from moesys.testing.parity import Numbers, compare, train_small
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import with_micro_steps

RANKS, CONFIGURATIONS = 4, 5
ROUTERS = [
    ComponentConfig(target="tests.train.recurrent_router.RecurrentRouter"),
    ComponentConfig(target="moesys.moe.routers.TopKRouter"),
    ComponentConfig(
        target="moesys.moe.routers.TopKRouter",
        options={"score_function": "sigmoid", "scaling_factor": 2.0},
    ),
]


def drawn(rng: random.Random) -> RunConfig:
    """With axes on all ranks, and without problems."""
    while True:
        config = _drawn(rng)
        if dims_or_none(config.parallel, RANKS) is None:
            continue
        config = with_micro_steps(config, RANKS, MICRO_STEPS)
        problems = [
            *find_layout_problems(config, RANKS),
            *find_pipeline_problems(config, RANKS),
        ]
        if not problems:
            return config


def _drawn(rng: random.Random) -> RunConfig:
    pick = rng.choice
    zero = pick([0, 0, 1, 2, 3])
    balance = BalanceConfig(
        **{f"{pick(['global', 'sequence'])}_loss_coef": 0.01},
        z_loss_coef=pick([0.0, 0.001]),
        bias_update_rate=pick([0.0, 0.01]),
    )
    moe = replace(
        BASE.model.moe,
        router=pick(ROUTERS),
        balance=balance,
        capacity_factor=pick([None, None, 8.0]),
        capacity_policy=pick(["drop", "pad"]),
        num_shared_experts=pick([0, 2]),
    )
    return replace(
        BASE,
        model=replace(
            BASE.model,
            moe=moe,
            num_dense_layers=pick([0, 1, 2]),
            tie_embeddings=pick([False, True]),
        ),
        data=replace(BASE.data, mask_documents=pick([False, True])),
        optim=replace(BASE.optim, clip_grad_norm=pick([0.0, 0.05])),
        parallel=ParallelConfig(
            pp=pick([1, 2, 2]),
            pp_schedule=pick(SCHEDULES),  # type: ignore[arg-type]
            cp=pick([1, 2]),
            cp_attention=pick(["ring", "ulysses"]),
            tp=pick([1, 2]),
            sequence_parallel=pick([False, True]),
            ep=pick([1, 2, 4]),
            etp=pick([1, 2]),
            zero=zero,  # type: ignore[arg-type]
            dp_shard=pick([None, 1, 2]) if zero else None,
        ),
        train=replace(
            BASE.train,
            steps=2,
            recompute=pick(["none", "moe", "attention", "selective", "layer"]),
        ),
    )


def train_all(rank: int, world_size: int, configs: list[RunConfig]) -> list[Numbers]:
    return [train_small(rank, world_size, config, MICRO_STEPS) for config in configs]


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(4))
def test_options_drawn_at_random_keep_one_process_numbers(seed):
    rng = random.Random(seed)
    configs = [drawn(rng) for _ in range(CONFIGURATIONS)]
    plain = [
        replace(c, parallel=ParallelConfig(), train=replace(c.train, recompute="none"))
        for c in configs
    ]
    (references,) = run_ranks(train_all, 1, plain, timeout_s=300)
    ranks = run_ranks(train_all, RANKS, configs, timeout_s=600)
    for i, (config, reference) in enumerate(zip(configs, references, strict=True)):
        difference = compare([numbers[i] for numbers in ranks], reference)
        assert difference.worst < MAX_ERROR, (config, difference)
        assert difference.weights < MAX_WEIGHT_ERROR, (config, difference)
