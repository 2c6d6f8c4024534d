"""The formulas of activation memory against what a forward of our blocks leaves behind.

Shapes: T tokens, D model, S positions.
"""

import gc
import itertools
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from moesys.config.schema import (
    BalanceConfig,
    MemoryLayersConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
)
from moesys.models.rope import rope_tables
from moesys.models.transformer import DenseBlock, MoEBlock, Transformer
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import build_meshes
from moesys.parallelize.build import build_parallel_model
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.parallelize.recompute import apply_recompute
from moesys.plan.activations import (
    ActivationCase,
    dense_block_bytes,
    memory_block_bytes,
    moe_block_bytes,
    paper_layer_bytes,
)
from moesys.testing.live_bytes import LiveBytes
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import small_config, small_model
from tests import figures

MODES = ("none", "moe", "attention", "selective", "layer")
SEQ_LEN, SAMPLES = 32, 4

MODEL = small_model(
    vocab_size=32,
    num_layers=3,
    memory_layers=MemoryLayersConfig(
        layers=(2,), num_keys=12, top_k=4, d_key=24, d_value=48, d_pre=16, rank=2, heads=2
    ),
    d_model=64,
    num_heads=8,
    d_ffn=176,
    init_std=0.02,
    num_experts=12,
    top_k=3,
    d_expert=48,
    balance=BalanceConfig(global_loss_coef=0.01, z_loss_coef=0.01),
)


FORMULAS = {"dense": dense_block_bytes, "moe": moe_block_bytes, "memory": memory_block_bytes}
"""Of the model's layers."""


def of_moe(**changes) -> ModelConfig:
    return replace(MODEL, moe=replace(MODEL.moe, **changes))


def of_memory(**changes) -> ModelConfig:
    return replace(MODEL, memory_layers=replace(MODEL.memory_layers, **changes))


def run_config(model: ModelConfig, parallel: ParallelConfig) -> RunConfig:
    return small_config(
        model, seq_len=SEQ_LEN, sequences=64, micro_batch_sequences=SAMPLES, parallel=parallel
    )


def left_behind(block: DenseBlock | MoEBlock, tokens: int, dtype: torch.dtype) -> int:
    """Bytes alive between forward and backward, the block's input included, its output not."""
    rope_SH = rope_tables(torch.arange(SEQ_LEN), MODEL.resolved_head_dim, 1e4)
    x_TD = torch.randn(tokens, MODEL.d_model, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        with LiveBytes() as live:
            out = block(x_TD * 1.0, rope_SH)
        y_TD, losses = (out, []) if isinstance(out, torch.Tensor) else out[:2]
        graph = [y_TD.grad_fn, *losses]
        del out, y_TD
        time.sleep(0.1)  # gloo's thread lets go of a collective's tensors a moment after it is done
        gc.collect()
        total = live.total
    del graph
    return total


def weigh(rank: int, size: int, model: ModelConfig, parallel: ParallelConfig, dtype) -> dict:
    """(block, mode) -> bytes that a further SAMPLES samples leave, so that weights and tables do not count."""
    config = run_config(model, parallel)
    meshes = build_meshes(parallel_dims(parallel, size), "cpu")
    found = {}
    for mode in MODES:
        torch.manual_seed(rank)
        built = build_parallel_model(config, meshes, torch.device("cpu"))
        apply_recompute(built.whole, mode)
        set_expert_backend(built.whole, "loop" if dtype == torch.float32 else "grouped_mm")
        tokens = SAMPLES * SEQ_LEN // (parallel.tp if parallel.sequence_parallel else 1)
        for name, block in zip(FORMULAS, built.whole.blocks(), strict=False):
            once, twice = (left_behind(block, n * tokens, dtype) for n in (1, 2))
            found[name, mode] = twice - once
    return found


def assert_formulas(measured: list[dict], model: ModelConfig, parallel: ParallelConfig, width):
    """Summed over ranks, so that an uneven load does not matter."""
    for name, mode in measured[0]:
        case = ActivationCase(
            model=model,
            tokens=SAMPLES * SEQ_LEN,
            activation_bytes=width,
            tp=parallel.tp,
            sequence_parallel=parallel.sequence_parallel,
            ep=parallel.ep,
            etp=parallel.etp,
            recompute=mode,
        )
        formula = FORMULAS[name](case)
        mean = sum(found[name, mode] for found in measured) / len(measured)
        assert mean == pytest.approx(formula, rel=0.02), (name, mode, mean / formula)
        figures.worst("activation_formula_error_pct", 100 * abs(mean / formula - 1))


GATED = replace(MODEL, attention_experts=3)
SHARED_KEYS = replace(MODEL, attention_experts=4, attention_experts_kv="shared")
LAYOUTS = {
    "one rank": (1, MODEL, ParallelConfig()),
    "qk norm": (1, replace(MODEL, qk_norm=True), ParallelConfig()),
    "latent experts": (1, of_moe(d_latent=40), ParallelConfig()),
    "latent experts alone": (1, of_moe(d_latent=40, num_shared_experts=0), ParallelConfig()),
    "weighed shared experts": (1, of_moe(shared_gate="sigmoid"), ParallelConfig()),
    "residual MoE": (1, of_moe(shared_gate="softmax", num_shared_experts=2), ParallelConfig()),
    "attention experts": (1, GATED, ParallelConfig()),
    "attention experts of shared keys, tp and sp": (2, SHARED_KEYS, ParallelConfig(tp=2)),
    "attention experts, tp": (2, GATED, ParallelConfig(tp=2, sequence_parallel=False)),
    "ep": (2, MODEL, ParallelConfig(ep=2)),
    "values without pre-values": (2, of_memory(d_pre=0, heads=1), ParallelConfig(ep=2)),
    "tp and sp": (2, MODEL, ParallelConfig(tp=2)),
    "tp": (2, MODEL, ParallelConfig(tp=2, sequence_parallel=False)),
    "etp": (
        2,
        replace(MODEL, num_layers=2, memory_layers=MemoryLayersConfig()),
        ParallelConfig(etp=2),
    ),
}


QUICK = (("one rank", torch.float32),)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param(
            *case, marks=() if case in QUICK else pytest.mark.parity, id=" ".join(map(str, case))
        )
        for case in itertools.product(LAYOUTS, (torch.float32, torch.bfloat16))
    ],
)
def test_formulas_are_what_a_forward_leaves(layout, dtype):
    size, model, parallel = LAYOUTS[layout]
    measured = run_ranks(weigh, size, model, parallel, dtype)
    assert_formulas(measured, model, parallel, 4 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_outlives_backward(mode):
    model = Transformer(MODEL)
    torch.nn.init.normal_(model.head.weight, 0, 0.1)
    apply_recompute(model, mode)
    set_expert_backend(model, "loop")
    ids_BS = torch.zeros(1, SEQ_LEN, dtype=torch.int64)
    with LiveBytes([*model.parameters(), *model.buffers(), ids_BS]) as live:
        model(ids_BS)[0].sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
        for layer in model.moe_layers():
            layer.load.take(ids_BS.device)
            layer.load.take_entropy(ids_BS.device)
            layer.balance.end_step()
        gc.collect()
        assert live.total == 0


def test_gpt3s_layer():
    """175B on t = 8 (a = 96, s = 2048, h = 12288): 34/8 of sbh where tensor parallelism alone keeps 23."""
    sbh = 2048 * 12288
    layer = partial(paper_layer_bytes, seq_len=2048, samples=1, num_heads=96, d_model=12288, tp=8)
    assert layer() == 23 * sbh
    assert layer(sequence_parallel=True) == (34 + 80) / 8 * sbh
    assert layer(recompute="selective") == 13 * sbh
    both = layer(sequence_parallel=True, recompute="selective")
    assert both == 34 / 8 * sbh
    assert layer() / both > 4.5
    assert layer(recompute="full") == 2 * sbh
