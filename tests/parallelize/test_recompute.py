"""Recomputation changes memory and nothing else: gradients, load, losses, biases, under every axis.

Shapes: B sequences, S positions, D model.
"""

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from moesys.config.schema import (
    BalanceConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from moesys.data.loader import MicroBatch
from moesys.optim.build import build_optimizer
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import build_meshes
from moesys.parallelize.build import ParallelModel, build_parallel_model
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.parallelize.recompute import apply_recompute
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import small_config, small_model
from moesys.train.step import TrainStep
from moesys.train.timing import SectionTimer
from tests.train.noisy_router import NoisyRouter

SEQ_LEN, SEQUENCES, MICRO_STEPS, STEPS = 8, 16, 4, 2
CPU = torch.device("cpu")
MODES = ("none", "moe", "attention", "selective", "layer")


class CountingRouter(NoisyRouter):
    """Draws noise, so that a second run would route otherwise; counts its runs."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.num_runs = 0

    def forward(self, x_TD, state=None):
        self.num_runs += 1
        return super().forward(x_TD, state)


CONFIG = small_config(
    small_model(
        vocab_size=32,
        d_model=16,
        d_ffn=24,
        init_std=0.2,
        num_experts=4,
        d_expert=16,
        router="tests.parallelize.test_recompute.CountingRouter",
        balance=BalanceConfig(global_loss_coef=0.01, z_loss_coef=0.001, bias_update_rate=0.01),
    ),
    seq_len=SEQ_LEN,
    sequences=SEQUENCES,
    micro_batch_sequences=SEQUENCES // MICRO_STEPS,
    steps=STEPS,
    seed=3,
    optim=OptimConfig(lr=3e-3, eps=1e-5),
)


def micro_batches(step: int, dp_rank: int, dp: int) -> list[MicroBatch]:
    ids = torch.randint(
        0, 32, (SEQUENCES, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step)
    )
    return [
        MicroBatch(input_ids_BS=x[:, :-1], target_ids_BS=x[:, 1:])
        for x in ids.chunk(MICRO_STEPS * dp)[dp_rank::dp]
    ]


def train(rank: int, size: int, config: RunConfig, mode: str) -> dict:
    meshes = build_meshes(parallel_dims(config.parallel, size), "cpu")
    torch.manual_seed(rank)
    parallel = build_parallel_model(config, meshes, CPU)
    for part in parallel.parts:
        apply_recompute(part, mode)
    model = parallel.whole
    set_expert_backend(model, "loop")
    optimizer = build_optimizer(model, config.optim)
    step = TrainStep(parallel, optimizer, meshes, config, SectionTimer(CPU))
    gradients = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append({n: whole(p.grad) for n, p in model.named_parameters()})
    )
    results = []
    for index in range(STEPS):
        batches = micro_batches(index, meshes.dp_rank, meshes.dims.dp)
        results.append(step(batches, 3e-3))
        evaluate(parallel, batches[0])
    layers = model.moe_layers()
    return {
        "gradients": gradients,
        "losses": [(r.loss, r.balance_loss, r.z_loss, r.grad_norm) for r in results],
        "loads": [r.expert_load_ME for r in results],
        "sent_bytes": [r.sent_bytes for r in results],
        "biases": [layer.router.selection_bias_E.clone() for layer in layers],
        "router_runs": [layer.router.num_runs for layer in layers],
    }


@torch.no_grad()
def evaluate(parallel: ParallelModel, batch: MicroBatch) -> None:
    """What must leave no trace in the counters."""
    if parallel.pipeline is None:
        parallel.whole.eval()
        parallel.whole(batch.input_ids_BS)


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def train_in_all_modes(rank: int, size: int, config: RunConfig) -> dict[str, dict]:
    return {mode: train(rank, size, config, mode) for mode in MODES}


def with_moe(**changes) -> RunConfig:
    return replace(CONFIG, model=replace(CONFIG.model, moe=replace(CONFIG.model.moe, **changes)))


def spread(config: RunConfig = CONFIG, **parallel) -> RunConfig:
    return replace(config, parallel=ParallelConfig(**parallel))


LAYOUTS = {
    "one process": (1, CONFIG),
    "ep": (2, spread(ep=2)),
    "ep, sequence level": (
        2,
        spread(with_moe(balance=BalanceConfig(sequence_loss_coef=0.01)), ep=2),
    ),
    "ep, padded": (2, spread(with_moe(capacity_factor=0.8, capacity_policy="pad"), ep=2)),
    "no balance loss": (1, with_moe(balance=BalanceConfig(bias_update_rate=0.01))),
    "tp and sp": (2, spread(tp=2, ep=2)),
    "tp": (2, spread(tp=2, ep=2, sequence_parallel=False)),
    "etp": (2, spread(etp=2)),
    "zero 1": (2, spread(zero=1)),
    "zero 2 and ep": (2, spread(zero=2, ep=2)),
    "zero 3": (2, spread(zero=3)),
    "bf16, ep": (2, replace(spread(ep=2), train=replace(CONFIG.train, dtype="bf16"))),
    "pp": (2, spread(pp=2)),
    "pp, weights later": (
        2,
        spread(
            replace(CONFIG, model=replace(CONFIG.model, num_layers=4)),
            pp=2,
            pp_schedule="interleaved_zero_bubble",
        ),
    ),
}


QUICK = ("one process", "ep", "pp")


@pytest.mark.parametrize(
    "layout",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.parity) for name in LAYOUTS],
)
def test_every_mode_has_the_numbers_of_none(layout):
    size, config = LAYOUTS[layout]
    for modes in run_ranks(train_in_all_modes, size, config):
        plain = modes.pop("none")
        assert any(bias.any() for bias in plain["biases"]) or "sequence" in layout
        for mode, ours in modes.items():
            for counter in ("loads", "losses", "router_runs"):
                assert ours[counter] == plain[counter], (mode, counter)
            for a, b in zip(ours["biases"], plain["biases"], strict=True):
                assert torch.equal(a, b), mode
            for step, expected in enumerate(plain["gradients"]):
                for name, gradient in expected.items():
                    assert torch.equal(ours["gradients"][step][name], gradient), (mode, name)


def test_rows_travel_again_for_whole_layers_only():
    """Forward and backward, there and back, are four exchanges; a layer's second forward adds two."""
    modes = run_ranks(train_in_all_modes, 2, spread(ep=2))[0]
    sent = {mode: found["sent_bytes"][0] for mode, found in modes.items()}
    assert sent["moe"] == sent["attention"] == sent["selective"] == sent["none"] > 0
    assert 2 * sent["layer"] == 3 * sent["none"]
