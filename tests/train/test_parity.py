"""Every layout trains with one process's numbers: losses and gradients over 20 steps.

Shapes: B sequences of S tokens, E experts.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from moesys.config.schema import (
    BalanceConfig,
    CheckpointConfig,
    ComponentConfig,
    DataConfig,
    MetricsConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    ScheduleConfig,
    TrainConfig,
)
from moesys.data.loader import MicroBatch
from moesys.optim.build import build_optimizer
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import build_meshes
from moesys.parallelize.build import build_parallel_model
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.testing.ranks import run_ranks
from moesys.train.step import TrainStep
from moesys.train.timing import SectionTimer

STEPS, SEQ_LEN, SEQUENCES = 20, 16, 8
CPU = torch.device("cpu")

CONFIG = RunConfig(
    run=RunSection(name="parity", dir="unused", seed=7),
    model=ModelConfig(
        vocab_size=64,
        num_layers=3,
        num_dense_layers=1,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        d_ffn=48,
        init_std=0.1,
        moe=MoEConfig(
            num_experts=8,
            top_k=2,
            d_expert=24,
            num_shared_experts=1,
            router=ComponentConfig(target="moesys.moe.routers.TopKRouter"),
            balance=BalanceConfig(aux_loss_coef=0.01, z_loss_coef=0.001, bias_update_rate=0.01),
        ),
    ),
    data=DataConfig(path="unused", seq_len=SEQ_LEN),
    # AdamW divides by |g|: with eps near the rounding of g, a first step may go either way for it (2e-5 of wq).
    optim=OptimConfig(lr=3e-3, eps=1e-5),
    schedule=ScheduleConfig(),
    parallel=ParallelConfig(),
    train=TrainConfig(
        steps=STEPS,
        global_batch_tokens=SEQUENCES * SEQ_LEN,
        micro_batch_tokens=SEQUENCES * SEQ_LEN,
    ),
    checkpoint=CheckpointConfig(),
    metrics=MetricsConfig(),
)


def micro_batches(step: int, rank: int, size: int, micro_steps: int) -> list[MicroBatch]:
    """The same SEQUENCES sequences of a step, whatever the layout; text with something to learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 64, (SEQUENCES, 1), generator=generator)
    stream = (start + 7 * torch.arange(SEQ_LEN + 1)) % 64
    batches = []
    for ids in stream.chunk(micro_steps * size)[rank::size]:
        batches.append(MicroBatch(input_ids_BS=ids[:, :-1], target_ids_BS=ids[:, 1:]))
    return batches


def train(rank: int, size: int, config: RunConfig, micro_steps: int = 1):
    """Losses, gradient norms, loads per step; and every whole gradient and weight at the end."""
    meshes = build_meshes(parallel_dims(config.parallel, size), "cpu")
    batch = micro_batches(0, 0, meshes.dims.dp, micro_steps)[0].input_ids_BS
    config = replace(config, train=replace(config.train, micro_batch_tokens=batch.numel()))
    parallel = build_parallel_model(config, meshes, CPU)
    model = parallel.whole
    set_expert_backend(model, "loop")
    optimizer = build_optimizer(model, config.optim)
    step = TrainStep(parallel, optimizer, meshes, config, SectionTimer(CPU))
    kept = []

    def keep_gradients(*_) -> None:
        kept.append({n: _whole(p.grad) for n, p in model.named_parameters()})

    optimizer.register_step_pre_hook(keep_gradients)
    samples = meshes.dp_rank, meshes.dims.dp, micro_steps
    results = [step(micro_batches(s, *samples), 3e-3) for s in range(STEPS)]
    weights = {n: _whole(p.detach()) for n, p in model.named_parameters()}
    biases = {n: b.clone() for n, b in model.named_buffers()}
    return results, kept, weights, biases


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@pytest.fixture(scope="module")
def one_process():
    return run_ranks(train, 1, CONFIG)[0]


def assert_all_same(ranks, reference) -> None:
    """Each rank's numbers are those of one process, and together the ranks have all of them."""
    for result in ranks:
        assert_same(result, reference)
    for figures in (1, 2, 3):
        names = [result[figures][0] if figures == 1 else result[figures] for result in ranks]
        whole = reference[figures][0] if figures == 1 else reference[figures]
        assert set().union(*names) == set(whole)


def assert_same(result, reference, bound: float = 1e-5) -> None:
    """Losses, norms, loads and all gradients of all steps that the rank has; the biases bit for bit."""
    results, grads, weights, biases = result
    ref_results, ref_grads, ref_weights, ref_biases = reference
    for ours, theirs in zip(results, ref_results, strict=True):
        for figure in ("loss", "grad_norm", "balance_loss", "z_loss"):
            pair = getattr(ours, figure), getattr(theirs, figure)
            assert math.isclose(*pair, rel_tol=bound), (figure, pair)
        assert ours.expert_load_ME == theirs.expert_load_ME
    for step, (ours, theirs) in enumerate(zip(grads, ref_grads, strict=True)):
        for name, gradient in ours.items():
            assert relative_error(gradient, theirs[name]) < bound, (step, name)
    for name, weight in weights.items():
        assert relative_error(weight, ref_weights[name]) < 10 * bound, name
    for name, bias in biases.items():
        assert torch.equal(bias, ref_biases[name]), name


@pytest.mark.parametrize(("size", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_losses_and_gradients_are_those_of_one_process(one_process, size, ep):
    config = replace(CONFIG, parallel=ParallelConfig(ep=ep))
    assert_all_same(run_ranks(train, size, config), one_process)


def test_micro_steps_over_ranks_are_those_of_one_process():
    """The global balance level counts the micro-steps so far, so their number is part of the mathematics."""
    config = replace(CONFIG, parallel=ParallelConfig(ep=2))
    reference = run_ranks(train, 1, CONFIG, 2)[0]
    for result in run_ranks(train, 2, config, 2):
        assert_same(result, reference)


def test_without_a_balance_loss_micro_steps_change_nothing():
    config = with_moe(balance=replace(CONFIG.model.moe.balance, aux_loss_coef=0.0))
    whole, cut = (run_ranks(train, 1, config, micro_steps)[0] for micro_steps in (1, 4))
    for ours, theirs in zip(cut[0], whole[0], strict=True):
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
        # Without a coefficient the global level is not summed over ranks, so the level here is another.
        with_moe(
            router=SIGMOID,
            balance=BalanceConfig(
                bias_update_rate=0.01, z_loss_coef=0.001, aux_loss_level="sequence"
            ),
        ),
        with_moe(balance=BalanceConfig(aux_loss_coef=0.01, aux_loss_level="sequence")),
        with_moe(capacity_factor=8.0, capacity_policy="pad"),
        with_moe(capacity_factor=8.0, capacity_policy="drop"),
        replace(CONFIG, model=replace(CONFIG.model, tie_embeddings=True, qk_norm=True)),
    ],
    ids=["sigmoid and bias", "sequence level", "padded", "capacity that suffices", "tied"],
)
def test_every_option_keeps_one_process_numbers(variant):
    reference = run_ranks(train, 1, variant)[0]
    for result in run_ranks(train, 2, replace(variant, parallel=ParallelConfig(ep=2))):
        assert_same(result, reference)


def test_bf16_learns_and_ep_changes_only_its_rounding():
    bf16 = replace(CONFIG, train=replace(CONFIG.train, dtype="bf16"))
    one = run_ranks(train, 1, bf16)[0][0]
    two = run_ranks(train, 2, replace(bf16, parallel=ParallelConfig(ep=2)))[0][0]
    assert one[-1].loss < 0.8 * one[0].loss
    for ours, theirs in zip(two, one, strict=True):
        assert math.isclose(ours.loss, theirs.loss, rel_tol=2e-2)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs| over the whole tensor."""
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def test_training_learns_and_the_bias_moves(one_process):
    results, _, _, biases = one_process
    assert results[-1].loss < 0.8 * results[0].loss
    assert all(bias.abs().max() > 0.01 for bias in biases.values())


def test_bytes_sent_are_the_rows_that_leave_each_rank_four_times():
    """With K = E each token's row goes to all experts: 3 of 4 ranks are others. Dispatch and combine,
    forward and backward, each carry D fp32 numbers per row."""
    moe = replace(CONFIG.model.moe, top_k=8)
    config = replace(CONFIG, parallel=ParallelConfig(ep=4), model=replace(CONFIG.model, moe=moe))
    rows = 2 * SEQUENCES * SEQ_LEN * 8 * 3 // 4
    for result in run_ranks(train, 4, config)[0][0]:
        assert result.sent_bytes == 4 * rows * 32 * 4
