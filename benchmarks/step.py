"""A whole training step of one process beside transformers models of the same size and weights.

Shapes: B sequences of S tokens.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.interleaved import paired_ratio, time_interleaved
from benchmarks.results import Cell, Result
from moesys.config.schema import (
    ModelConfig,
    OptimConfig,
)
from moesys.data.loader import MicroBatch
from moesys.optim.build import build_optimizer
from moesys.parallel.bootstrap import process_group
from moesys.parallel.dims import ParallelDims
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.parallelize.build import build_parallel_model
from moesys.parallelize.expert_backend import choose_expert_backend, set_expert_backend
from moesys.testing.small_run import small_config, small_model
from moesys.train.step import TrainStep
from moesys.train.timing import SectionTimer

DESCRIPTION = (
    "a training step against transformers' Mixtral and Qwen3-MoE of equal size (tokens/s, ratio)"
)

TOLERANCE = 1e-4
"""Relative, on the losses and gradient norms of the first two steps: the second has seen the optimizer."""
OPTIM = OptimConfig(lr=1e-4)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and its batch: B sequences of S tokens, one micro-batch per step."""

    name: str
    model: ModelConfig
    batch: int
    seq_len: int


def _size(
    name: str, *, vocab: int, layers: int, d: int, e: int, k: int, f: int, batch: int, seq: int
) -> Size:
    model = small_model(
        vocab_size=vocab,
        num_layers=layers,
        num_dense_layers=0,
        d_model=d,
        num_heads=d // 64,
        num_kv_heads=d // 128,
        d_ffn=f,
        init_std=0.02,
        num_experts=e,
        top_k=k,
        d_expert=f,
        num_shared_experts=0,
    )
    return Size(name=name, model=model, batch=batch, seq_len=seq)


# fmt: off
SIZES = [
    _size("coarse", vocab=4096, layers=4, d=256, e=8, k=2, f=512, batch=8, seq=256),
    _size("fine", vocab=4096, layers=4, d=256, e=64, k=8, f=128, batch=8, seq=256),
    _size("wide", vocab=16384, layers=2, d=512, e=16, k=2, f=1024, batch=4, seq=512),
]
QUICK_SIZES = [_size("quick", vocab=512, layers=2, d=128, e=8, k=2, f=128, batch=4, seq=64)]
# fmt: on


def run(quick: bool, progress: Callable[[str], None]) -> Result:
    with process_group("cpu", timeout_s=600.0) as process:
        meshes = build_meshes(ParallelDims(world_size=1), process.device.type)
        return compare(
            QUICK_SIZES if quick else SIZES,
            meshes,
            budget_s=3.0 if quick else 30.0,
            progress=progress,
        )


def compare(
    sizes: Sequence[Size], meshes: Meshes, *, budget_s: float, progress: Callable[[str], None]
) -> Result:
    """Each size as Mixtral and as Qwen3-MoE, about `budget_s` seconds each. RuntimeError where losses differ."""
    rows: list[dict[str, Cell]] = []
    for size in sizes:
        for qk_norm in (False, True):
            as_family = replace(size, model=replace(size.model, qk_norm=qk_norm))
            rows.append(_compare(as_family, meshes, budget_s))
            row = rows[-1]
            progress(
                f"{row['size']} {row['family']}: {row['ours_tokens_per_s']:.0f} tokens/s, "
                f"ratio {row['ratio_to_best']:.2f}"
            )
            gc.collect()
    ratios = [float(row["ratio_to_best"] or 0) for row in rows]
    return Result(
        headline={
            "min_ratio_to_transformers": min(ratios),
            "geomean_ratio_to_transformers": statistics.geometric_mean(ratios),
            "max_tokens_per_s": max(float(row["ours_tokens_per_s"] or 0) for row in rows),
        },
        rows=rows,
    )


class OurModel:
    """Our model under TrainStep: what `moesys train` runs for one step."""

    def __init__(self, size: Size, meshes: Meshes, compiled: bool = False) -> None:
        tokens = size.batch * size.seq_len
        config = small_config(
            size.model,
            seq_len=size.seq_len,
            sequences=size.batch,
            seed=1,
            optim=OPTIM,
            compile=compiled,
        )
        device = torch.device(meshes.expert.device_type)
        parallel = build_parallel_model(config, meshes, device)
        self.model = parallel.whole
        self.backend, _ = choose_expert_backend(
            size.model, meshes, micro_batch_tokens=tokens, dtype=torch.float32
        )
        set_expert_backend(self.model, self.backend)
        optimizer = build_optimizer(self.model, OPTIM)
        self.train_step = TrainStep(parallel, optimizer, meshes, config, SectionTimer(device))

    def step(self, input_ids_BS: torch.Tensor, target_ids_BS: torch.Tensor) -> tuple[float, float]:
        """One optimizer step; mean loss in nats per token, and the gradient norm before clipping."""
        batch = MicroBatch(input_ids_BS=input_ids_BS, target_ids_BS=target_ids_BS)
        result = self.train_step([batch], OPTIM.lr)
        return result.loss, result.grad_norm


def _compare(size: Size, meshes: Meshes, budget_s: float) -> dict[str, Cell]:
    from benchmarks.peers.transformers_model import MODEL_IMPLEMENTATIONS, TransformersModel

    ours = OurModel(size, meshes)
    weights = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    peers: dict[str, Any] = {
        name: TransformersModel(size.model, OPTIM, weights, name) for name in MODEL_IMPLEMENTATIONS
    }
    generator = torch.Generator().manual_seed(0)
    stream_BS = torch.randint(
        0, size.model.vocab_size, (size.batch, size.seq_len + 1), generator=generator
    )
    inputs_BS, targets_BS = stream_BS[:, :-1].contiguous(), stream_BS[:, 1:].contiguous()
    error = check_parity(ours, peers, inputs_BS, targets_BS)

    def step_of(model: Any) -> Callable[[], object]:
        return lambda: model.step(inputs_BS, targets_BS)

    times_ms = time_interleaved(
        {name: step_of(model) for name, model in {"ours": ours, **peers}.items()},
        device=torch.device(meshes.expert.device_type),
        budget_s=budget_s,
        warmup_rounds=0,  # the parity steps were it
    )
    ratios = {name: paired_ratio(times_ms[name], times_ms["ours"]) for name in peers}
    tokens = size.batch * size.seq_len
    row: dict[str, Cell] = {
        "size": size.name,
        "family": "qwen3_moe" if size.model.qk_norm else "mixtral",
        "parameters": sum(weight.numel() for weight in weights.values()),
        "tokens": tokens,
        "ours_tokens_per_s": tokens / statistics.median(times_ms["ours"]) * 1e3,
    }
    for name in peers:
        row[f"{name}_tokens_per_s"] = tokens / statistics.median(times_ms[name]) * 1e3
    row |= {f"{name}_ratio": ratio for name, ratio in ratios.items()}
    return row | {
        "ratio_to_best": min(ratios.values()),
        "backend": ours.backend,
        "parity_error": error,
        "rounds": len(times_ms["ours"]),
    }


def check_parity(
    ours: Any, peers: dict[str, Any], inputs_BS: torch.Tensor, targets_BS: torch.Tensor
) -> float:
    """Largest relative difference in loss and gradient norm over two steps; RuntimeError if too large."""
    truth = [*ours.step(inputs_BS, targets_BS), *ours.step(inputs_BS, targets_BS)]
    worst = 0.0
    for name, peer in peers.items():
        found = [*peer.step(inputs_BS, targets_BS), *peer.step(inputs_BS, targets_BS)]
        error = max(abs(f - t) / abs(t) for f, t in zip(found, truth, strict=True))
        if not error <= TOLERANCE:
            raise RuntimeError(
                f"{name} computes something else than ours, so it is not timed: loss and gradient norm of "
                f"two steps are {found}, ours {truth}"
            )
        worst = max(worst, error)
    return worst
