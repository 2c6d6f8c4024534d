"""The MoE layer, forward and backward, beside other systems' layers with the same weights and input.

Shapes: T tokens, D model, F expert hidden, E experts, K experts per token.
"""

import gc
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import paired_ratio, relative_error, time_interleaved
from benchmarks.peers.moe_layer import LayerContestant, LayerShape, LayerWeights, gradient
from benchmarks.results import Cell, Result
from moesys.config.schema import ComponentConfig, MoEConfig
from moesys.moe.layer import MoELayer
from moesys.profile.experts import time_expert_backends

DESCRIPTION = "the MoE layer against those of transformers and DeepSpeed (ms, ratio)"
GPU = True

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest relative error of outputs and gradients between two systems that compute the same thing."""


def _shape(e: int, k: int, t: int, d: int) -> LayerShape:
    # Two experts' worth of d_model per token, however many experts share it.
    return LayerShape(num_experts=e, top_k=k, num_tokens=t, d_model=d, d_expert=2 * d // k)


# The corners of E 8..64, K 2..8 (4 where there are 8 experts), T 512..8192, D 256..1024, then between them.
SHAPES = [
    *(
        _shape(e, k, t, d)
        for e, k in ((8, 2), (8, 4), (64, 2), (64, 8))
        for t in (512, 8192)
        for d in (256, 1024)
    ),
    _shape(16, 2, 2048, 512),
    _shape(16, 4, 2048, 256),
    _shape(16, 8, 512, 512),
    _shape(32, 2, 8192, 512),
    _shape(32, 4, 2048, 512),
    _shape(32, 4, 512, 1024),
    _shape(32, 8, 2048, 1024),
    _shape(64, 4, 2048, 512),
]
QUICK_SHAPES = [_shape(8, 2, 512, 256), _shape(32, 4, 2048, 256), _shape(64, 8, 512, 512)]


def run(quick: bool, progress: Callable[[str], None]) -> Result:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return compare(
        QUICK_SHAPES if quick else SHAPES,
        device=device,
        dtype=dtype,
        budget_s=1.5 if quick else 10.0,
        progress=progress,
    )


def compare(
    shapes: Sequence[LayerShape],
    *,
    device: torch.device,
    dtype: torch.dtype,
    budget_s: float,
    progress: Callable[[str], None],
) -> Result:
    """Time all shapes, about `budget_s` seconds each. RuntimeError if a system computes something else."""
    rows = []
    for shape in shapes:
        torch.manual_seed(0)
        weights = LayerWeights.random(shape, device, dtype)
        x_TD = torch.randn(shape.num_tokens, shape.d_model, device=device, dtype=dtype)
        ours = OurLayer(shape, weights)
        peers = build_peers(shape, weights)
        errors = check_parity(ours, peers, x_TD)
        row = _time(shape, ours, peers, x_TD, budget_s) | {"backend": ours.backend}
        rows.append(row | {"parity_error": max(errors.values(), default=0.0)})
        progress(
            f"{row['shape']}: ours {row['ours_ms']:.1f} ms, best peer {row['best_peer']}, "
            f"ratio {row['ratio_to_best_peer'] or 0:.2f}"
        )
        del ours, peers
        gc.collect()
    return Result(headline=_headline(rows), rows=rows)


class OurLayer:
    """moesys.moe.MoELayer holding a copy of `weights`, on the backend a training run would choose."""

    def __init__(self, shape: LayerShape, weights: LayerWeights) -> None:
        config = MoEConfig(
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            d_expert=shape.d_expert,
            router=ComponentConfig(target="moesys.moe.routers.TopKRouter"),
        )
        with torch.device("meta"):
            self.layer: Any = MoELayer(config, shape.d_model)
        device, dtype = weights.router_ED.device, weights.router_ED.dtype
        self.layer.to(dtype).to_empty(device=device)
        times = time_expert_backends(
            num_rows=shape.num_tokens * shape.top_k,
            num_experts=shape.num_experts,
            d_model=shape.d_model,
            d_expert=shape.d_expert,
            dtype=dtype,
            device=device,
        )
        self.backend = self.layer.experts.backend = times.fastest
        with torch.no_grad():
            self.layer.router.weight.copy_(weights.router_ED)
            self.layer.router.selection_bias_E.zero_()
            self.layer.experts.gate_up.flatten(1, 2).copy_(weights.gate_up_E2FD)
            self.layer.experts.down.copy_(weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD[None])[0][0]

    def parameters(self) -> list[Tensor]:
        return list(self.layer.parameters())

    def gradients(self) -> LayerWeights:
        return LayerWeights(
            router_ED=gradient(self.layer.router.weight),
            gate_up_E2FD=gradient(self.layer.experts.gate_up).flatten(1, 2),
            down_EDF=gradient(self.layer.experts.down),
        )


def build_peers(shape: LayerShape, weights: LayerWeights) -> dict[str, LayerContestant]:
    """Every peer installed here that can hold this shape."""
    peers: dict[str, LayerContestant] = {}
    if importlib.util.find_spec("transformers"):
        from benchmarks.peers.transformers_layer import (
            IMPLEMENTATIONS,
            TransformersLayer,
            fits_batched_mm,
        )

        for implementation in IMPLEMENTATIONS:
            if implementation != "batched_mm" or fits_batched_mm(shape):
                name = f"transformers_{implementation}"
                peers[name] = TransformersLayer(shape, weights, implementation)
    if importlib.util.find_spec("deepspeed"):
        from benchmarks.peers.deepspeed_layer import DeepSpeedLayer

        peers["deepspeed"] = DeepSpeedLayer(shape, weights)
    return peers


def check_parity(
    ours: LayerContestant, peers: dict[str, LayerContestant], x_TD: Tensor
) -> dict[str, float]:
    """Largest relative error of output and all gradients of each peer against ours; RuntimeError if too large."""
    gradient_TD = torch.randn_like(x_TD)
    truth = _outcome(ours, x_TD, gradient_TD)
    errors: dict[str, float] = {}
    for name, peer in peers.items():
        outcome = _outcome(peer, x_TD, gradient_TD)
        parts = {part: relative_error(outcome[part], truth[part]) for part in truth}
        errors[name] = max(parts.values())
        if errors[name] > TOLERANCE[x_TD.dtype]:
            worst = ", ".join(f"{part} {error:.1e}" for part, error in parts.items())
            raise RuntimeError(
                f"{name} computes something else than ours, so it is not timed: {worst}"
            )
    return errors


def _outcome(layer: LayerContestant, x_TD: Tensor, gradient_TD: Tensor) -> dict[str, Tensor]:
    x_TD = x_TD.detach().clone().requires_grad_()
    y_TD = layer.forward(x_TD)
    y_TD.backward(gradient_TD)
    outcome = {"output": y_TD.detach(), "input": gradient(x_TD)}
    outcome |= {name: value.clone() for name, value in vars(layer.gradients()).items()}
    _forget_gradients(layer)
    return outcome


def _forget_gradients(layer: LayerContestant) -> None:
    for parameter in layer.parameters():
        parameter.grad = None


def _time(
    shape: LayerShape,
    ours: LayerContestant,
    peers: dict[str, LayerContestant],
    x_TD: Tensor,
    budget_s: float,
) -> dict[str, Cell]:
    x_TD = x_TD.detach().clone().requires_grad_()
    gradient_TD = torch.randn_like(x_TD)
    layers: dict[str, LayerContestant] = {"ours": ours, **peers}

    def forward_backward(layer: LayerContestant) -> Callable[[], None]:
        return lambda: layer.forward(x_TD).backward(gradient_TD)

    def forget() -> None:
        x_TD.grad = None
        for layer in layers.values():
            _forget_gradients(layer)

    times_ms = time_interleaved(
        {name: forward_backward(layer) for name, layer in layers.items()},
        device=x_TD.device,
        budget_s=budget_s,
        between=forget,
    )
    ratios = {name: paired_ratio(times_ms[name], times_ms["ours"]) for name in peers}
    best = min(ratios, key=lambda name: ratios[name], default=None)
    row: dict[str, Cell] = {
        "shape": f"E{shape.num_experts} K{shape.top_k} T{shape.num_tokens} D{shape.d_model} F{shape.d_expert}",
        "ours_ms": statistics.median(times_ms["ours"]),
    }
    for name in (
        "transformers_eager",
        "transformers_grouped_mm",
        "transformers_batched_mm",
        "deepspeed",
    ):
        row[f"{name}_ms"] = statistics.median(times_ms[name]) if name in peers else None
        row[f"{name}_ratio"] = ratios.get(name)
    row["best_peer"] = best
    row["ratio_to_best_peer"] = ratios[best] if best else None
    row["ours_gflop_per_s"] = shape.flops / statistics.median(times_ms["ours"]) / 1e6
    row["rounds"] = len(times_ms["ours"])
    return row


def _headline(rows: Sequence[dict[str, Cell]]) -> dict[str, float]:
    rates = [float(row["ours_gflop_per_s"] or 0) for row in rows]
    headline = {"shapes": float(len(rows)), "max_gflop_per_s": max(rates)}
    ratios = [float(r) for row in rows if (r := row["ratio_to_best_peer"]) is not None]
    if ratios:
        headline |= {
            "min_ratio_to_best_peer": min(ratios),
            "geomean_ratio_to_best_peer": statistics.geometric_mean(ratios),
        }
    return headline
