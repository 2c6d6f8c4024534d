"""A run folder as a real run would leave it: falling loss, drifting skewed loads, a kill and a resume."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moesys.train.metrics import MetricsLog

START_UNIX_S = 1_790_000_000.0
UNIGRAM_BITS = 4.41
BITS_PER_NAT = 1 / math.log(2) / 3.9


def start_record(*, steps: int, unix_s: float, resumed_from_step: int = 0) -> dict[str, Any]:
    return {
        "kind": "start", "unix_s": unix_s, "world_size": 4, "dp": 4, "ep": 2, "device": "cpu",
        "dtype": "fp32", "backend": "gloo", "expert_backend": "grouped_mm",
        "expert_backend_reason": "1.2 ms, loop 3.4 ms", "notes": [], "peak_tflops": 0.68,
        "peak_source": "measured, a large fp32 matrix product on rank 0", "parameters": 18_874_368, "active_parameters": 7_340_032,
        "flops_per_token": 4.4e7, "steps": steps, "resumed_from_step": resumed_from_step,
    }  # fmt: skip


def train_record(
    step: int, *, steps: int, layers: int, experts: int, rng: np.random.Generator, load: bool = True
) -> dict[str, Any]:
    """One train record; loads are skewed early, even out, and drift between experts."""
    loss = 2.1 + 6.2 * math.exp(-step / (0.12 * steps)) + 0.06 * rng.standard_normal()
    done = step / steps
    tokens = 8192
    centre = np.arange(layers)[:, None] + experts * done
    skew = (1.6 * math.exp(-4 * done) + 0.15) * np.cos(
        2 * np.pi * (np.arange(experts)[None] - centre) / experts
    )
    noise = 0.12 * rng.standard_normal((layers, experts))
    share = np.exp(skew + noise)
    if experts > 2:
        share[0, 2] = 0.0 if 0.3 < done < 0.5 else share[0, 2]
    load_LE = np.rint(2 * tokens * share / share.sum(axis=1, keepdims=True)).astype(int)
    ratios = load_LE.max(axis=1) / load_LE.mean(axis=1)
    slow = 9.0 if step == 1 else 1.0
    parts = {"data": 4.0, "forward": 112.0, "backward": 201.0, "optimizer": 22.0}
    times = {
        f"{name}_ms": slow * ms * (1 + 0.06 * abs(rng.standard_normal()))
        for name, ms in parts.items()
    }
    step_ms = sum(times.values()) + 6.0
    times |= {"exchange_ms": 0.13 * step_ms, "checkpoint_ms": 160.0 if step % 100 == 1 else 0.0}
    tokens_per_s = tokens / step_ms * 1e3
    return {
        "kind": "train", "step": step, "tokens": step * tokens, "loss": loss, "bits_per_byte": loss * BITS_PER_NAT,
        "aux_loss": 0.01 * (1 + skew.max()), "z_loss": 0.002, "lr": 3e-3 * min(1, step / (0.05 * steps)) * (1 - 0.9 * done),
        "grad_norm": 0.4 + 4 * math.exp(-step / (0.05 * steps)) * rng.uniform(0.7, 1.4), "tokens_per_s": tokens_per_s,
        "tflops_per_rank": tokens_per_s * 4.4e7 / 4e12, "mfu": tokens_per_s * 4.4e7 / 4e12 / 0.68,
        "load_imbalance": float(ratios.mean()), "max_load_imbalance": float(ratios.max()),
        "dead_experts": int((load_LE == 0).sum()), "dropped_slots": 0, "sent_bytes": 25_165_824,
        "between_nodes_bytes": 6_291_456, "step_ms": step_ms,
        **times, "unix_s": START_UNIX_S + 0.36 * step, "expert_load": load_LE.tolist() if load else [],
    }  # fmt: skip


def write_run(
    folder: Path,
    *,
    steps: int = 600,
    layers: int = 4,
    experts: int = 16,
    until: int | None = None,
    seed: int = 0,
) -> Path:
    """A run of `steps` that stopped at 40 %, was resumed from the checkpoint before, and ended at `until`."""
    rng = np.random.default_rng(seed)
    end = steps if until is None else until
    broke, resume = int(0.42 * steps), int(0.4 * steps)
    pieces = [(0, broke), (resume, end)] if steps >= 100 and end > broke else [(0, end)]
    for first, last in pieces:
        log = MetricsLog(folder, resume_step=first)
        log.write(
            start_record(steps=steps, unix_s=START_UNIX_S + 0.36 * first, resumed_from_step=first)
        )
        for step in range(first + 1, last + 1):
            unix_s = START_UNIX_S + 0.36 * step
            record = train_record(step, steps=steps, layers=layers, experts=experts, rng=rng)
            log.write(record)
            if step % 50 == 0:
                loss = record["loss"] + 0.03
                log.write({"kind": "eval", "step": step, "val_loss": loss, "val_bits_per_byte": loss * BITS_PER_NAT, "val_tokens": 65536, "eval_ms": 800.0, "unix_s": unix_s})  # fmt: skip
            if step % 100 == 0:
                log.write(
                    {
                        "kind": "checkpoint",
                        "step": step,
                        "checkpoint_ms": 160.0,
                        "bytes": 226_492_416,
                        "unix_s": unix_s,
                    }
                )
        if last in (broke, steps):
            reason = "stopped" if last == broke else "done"
            unix_s = START_UNIX_S + 0.36 * last
            log.write({"kind": "stop", "step": last, "reason": reason, "unix_s": unix_s})
        log.close()
    write_config(folder)
    write_manifest(folder)
    if end == steps:
        write_summary(folder, steps=steps)
    return folder


def write_config(folder: Path) -> None:
    config = {
        "run": {"name": "tiny-moe", "dir": "runs/tiny-moe", "seed": 0},
        "model": {
            "num_layers": 5,
            "d_model": 256,
            "moe": {"num_experts": 16, "top_k": 2, "d_expert": 256},
        },
        "optim": {"lr": 3e-3, "weight_decay": 0.1},
        "train": {"steps": 600, "global_batch_tokens": 8192, "dtype": "fp32"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def write_manifest(folder: Path) -> None:
    edges = [2**i for i in range(4, 17)]
    documents = [3, 18, 120, 610, 1900, 3100, 2800, 1500, 610, 190, 44, 9]
    manifest = {
        "unigram_bits_per_byte": UNIGRAM_BITS,
        "splits": {"train": {"length_histogram": {"edges_tokens": edges, "documents": documents}}},
    }
    (folder / "data_manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def write_summary(folder: Path, *, steps: int) -> None:
    summary = {
        "val_bits_per_byte": 0.7893, "unigram_bits_per_byte": UNIGRAM_BITS, "tokens_per_s": 23_457.0, "wall_s": 231.5,
        "world_size": 4, "parameters": 18_874_368, "active_parameters": 7_340_032, "steps": steps, "status": "done",
        "torch": "2.13.0", "host": "node-a",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
