"""A whole training step with `train.compile` beside one without: the same weights, interleaved."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.interleaved import paired_ratio, time_interleaved
from benchmarks.results import Cell, Result
from benchmarks.step import QUICK_SIZES, SIZES, OurModel, Size
from moesys.parallel.bootstrap import process_group
from moesys.parallel.dims import ParallelDims
from moesys.parallel.mesh import Meshes, build_meshes

DESCRIPTION = "a training step with train.compile against one without (ratio, seconds to compile)"
GPU = True


def run(quick: bool, progress: Callable[[str], None]) -> Result:
    with process_group("auto", timeout_s=600.0) as process:
        meshes = build_meshes(ParallelDims(world_size=1), process.device.type)
        sizes = QUICK_SIZES if quick else SIZES
        return compare(sizes, meshes, budget_s=1.0 if quick else 40.0, progress=progress)


def compare(
    sizes: Sequence[Size], meshes: Meshes, *, budget_s: float, progress: Callable[[str], None]
) -> Result:
    """Each size with norms of queries and keys, about `budget_s` seconds each."""
    rows: list[dict[str, Cell]] = []
    for size in sizes:
        rows.append(
            _compare(replace(size, model=replace(size.model, qk_norm=True)), meshes, budget_s)
        )
        progress(f"{size.name}: {rows[-1]['speedup']:.3f} times as fast compiled")
    speedups = [float(row["speedup"] or 0) for row in rows]
    return Result(
        headline={
            "min_compile_speedup": min(speedups),
            "geomean_compile_speedup": statistics.geometric_mean(speedups),
        },
        rows=rows,
    )


def _compare(size: Size, meshes: Meshes, budget_s: float) -> dict[str, Cell]:
    models = {
        name: OurModel(size, meshes, compiled=name == "compiled") for name in ("plain", "compiled")
    }
    device = torch.device(meshes.expert.device_type)
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch, size.seq_len + 1)
    stream_BS = torch.randint(0, size.model.vocab_size, shape, generator=generator).to(device)
    inputs_BS, targets_BS = stream_BS[:, :-1].contiguous(), stream_BS[:, 1:].contiguous()
    models["plain"].step(inputs_BS, targets_BS)
    began_s = time.perf_counter()
    models["compiled"].step(inputs_BS, targets_BS)
    first_step_s = time.perf_counter() - began_s
    times_ms = time_interleaved(
        {
            name: lambda model=model: model.step(inputs_BS, targets_BS)
            for name, model in models.items()
        },
        device=device,
        budget_s=budget_s,
    )
    return {
        "size": size.name,
        "plain_ms": statistics.median(times_ms["plain"]),
        "compiled_ms": statistics.median(times_ms["compiled"]),
        "speedup": paired_ratio(times_ms["plain"], times_ms["compiled"]),
        "first_step_s": first_step_s,
        "rounds": len(times_ms["plain"]),
    }
