"""Every layout trains with one process's numbers: losses and gradients over 20 steps.

Shapes: B sequences of S tokens, E experts.
"""

import math
from dataclasses import replace

import pytest

from moesys.config.schema import (
    BalanceConfig,
    ComponentConfig,
    ParallelConfig,
    RunConfig,
)
from moesys.testing.layouts import SMALL as CONFIG
from moesys.testing.parity import compare, parity

STEPS = CONFIG.train.steps


@pytest.fixture(scope="module")
def one_process():
    return parity(CONFIG, 1, 1)[0]


def assert_same(ranks, reference) -> None:
    difference = compare(ranks, reference)
    assert difference.worst < 1e-5, difference
    assert difference.weights < 1e-4, difference


@pytest.mark.parametrize(
    ("size", "ep"),
    [(4, 4), *(pytest.param(*x, marks=pytest.mark.parity) for x in ((2, 1), (2, 2), (4, 2)))],
)
def test_losses_and_gradients_are_those_of_one_process(one_process, size, ep):
    config = replace(CONFIG, parallel=ParallelConfig(ep=ep))
    assert_same(parity(config, size, 1), one_process)


def test_micro_steps_over_ranks_are_those_of_one_process():
    """The global balance level counts the micro-steps so far, so their number is part of the mathematics."""
    config = replace(CONFIG, parallel=ParallelConfig(ep=2))
    assert_same(parity(config, 2, 2), parity(CONFIG, 1, 2)[0])


def test_without_a_balance_loss_micro_steps_change_nothing():
    config = with_moe(balance=replace(CONFIG.model.moe.balance, global_loss_coef=0.0))
    whole, cut = (parity(config, 1, micro_steps)[0] for micro_steps in (1, 4))
    for ours, theirs in zip(cut.results, whole.results, strict=True):
        assert math.isclose(ours.loss, theirs.loss, rel_tol=1e-5)
        assert math.isclose(ours.grad_norm, theirs.grad_norm, rel_tol=1e-5)


def with_moe(**changes) -> RunConfig:
    return replace(CONFIG, model=replace(CONFIG.model, moe=replace(CONFIG.model.moe, **changes)))


SIGMOID = ComponentConfig(
    target="moesys.moe.routers.TopKRouter",
    options={"score_function": "sigmoid", "scaling_factor": 2.0},
)


@pytest.mark.parametrize(
    "variant",
    [
        with_moe(
            router=SIGMOID,
            balance=BalanceConfig(bias_update_rate=0.01, z_loss_coef=0.001),
        ),
        pytest.param(
            with_moe(balance=BalanceConfig(sequence_loss_coef=0.01)), marks=pytest.mark.parity
        ),
        with_moe(capacity_factor=8.0, capacity_policy="pad"),
        pytest.param(
            with_moe(capacity_factor=8.0, capacity_policy="drop"), marks=pytest.mark.parity
        ),
        pytest.param(
            replace(CONFIG, model=replace(CONFIG.model, tie_embeddings=True, qk_norm=True)),
            marks=pytest.mark.parity,
        ),
    ],
    ids=["sigmoid and bias", "sequence level", "padded", "capacity that suffices", "tied"],
)
def test_every_option_keeps_one_process_numbers(variant):
    spread = replace(variant, parallel=ParallelConfig(ep=2))
    assert_same(parity(spread, 2, 1), parity(variant, 1, 1)[0])


def test_bf16_learns_and_ep_changes_only_its_rounding():
    bf16 = replace(CONFIG, train=replace(CONFIG.train, dtype="bf16"))
    one = parity(bf16, 1, 1)[0].results
    two = parity(replace(bf16, parallel=ParallelConfig(ep=2)), 2, 1)[0].results
    assert one[-1].loss < 0.8 * one[0].loss
    for ours, theirs in zip(two, one, strict=True):
        assert math.isclose(ours.loss, theirs.loss, rel_tol=2e-2)


def test_training_learns_and_the_bias_moves(one_process):
    results = one_process.results
    assert results[-1].loss < 0.8 * results[0].loss
    assert all(bias.abs().max() > 0.01 for bias in one_process.buffers.values())


def test_bytes_sent_are_the_rows_that_leave_each_rank_four_times():
    """With K = E each token's row goes to all experts: 3 of 4 ranks are others. Dispatch and combine,
    forward and backward, each carry D fp32 numbers per row."""
    moe = replace(CONFIG.model.moe, top_k=8)
    config = replace(CONFIG, parallel=ParallelConfig(ep=4), model=replace(CONFIG.model, moe=moe))
    rows = 2 * CONFIG.train.global_batch_tokens * 8 * 3 // 4
    for result in parity(config, 4, 1)[0].results:
        assert result.sent_bytes == 4 * rows * 32 * 4
