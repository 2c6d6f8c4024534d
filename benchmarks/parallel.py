"""Every parallel axis alone on two ranks of this machine: bytes against their formula, what a step costs beside one
rank that does the same share of the work, how much of the communication is hidden. With it the figures of the suites
about parallelism, and every layout of the parity suite against one process.

    exposed_ms    of a step, in calls of torch.distributed and in waits for them, on the thread that computes
    alone_ms      the same calls and waits in the same order with nothing computed in between
    overlap       1 - exposed / alone, at least 0

exposed_ms has also what a rank waits for the slower one, so overlap is a lower bound; and gloo's own threads share the
two cores with the ranks' computation. A pipeline's waits are its bubble first of all: it has no overlap here.
"""

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.calls import overlap
from benchmarks.interleaved import paired_ratio
from benchmarks.results import Cell, Result
from benchmarks.traffic import count_step, formula
from moesys.config.schema import (
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from moesys.testing.layouts import BASE, LAYOUTS, MAX_ERROR, MAX_WEIGHT_ERROR, MICRO_STEPS
from moesys.testing.parity import compare as difference_of
from moesys.testing.parity import parity
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, small_config, small_model

DESCRIPTION = "each parallel axis alone: bytes against the formula, step time against one rank's share, overlap"
RESULT = "parallel"

RANKS = 2
SHARE = "half the sequences"
"""What one rank does alone: of the whole model, so the optimizer's work is whole too. Half of all products."""

AXES: dict[str, dict[str, Any]] = {
    "pp 1f1b": {"pp": 2},
    "dp": {},
    "zero 1": {"zero": 1},
    "zero 2": {"zero": 2},
    "zero 3": {"zero": 3},
    "cp ring": {"cp": 2},
    "cp ulysses": {"cp": 2, "cp_attention": "ulysses"},
    "tp": {"tp": 2},
    "tp without sp": {"tp": 2, "sequence_parallel": False},
    "ep": {"ep": 2},
    "etp": {"etp": 2},
}


def _config(d_model: int, d_expert: int, vocab_size: int, seq_len: int) -> RunConfig:
    """Eight sequences a step, two of them a data rank's micro-batch."""
    model = small_model(
        vocab_size=vocab_size,
        num_layers=4,
        d_model=d_model,
        num_heads=d_model // 32,
        num_kv_heads=d_model // 64,
        d_ffn=2 * d_model,
        init_std=0.02,
        d_expert=d_expert,
        num_shared_experts=0,
    )
    return small_config(
        model,
        seq_len=seq_len,
        sequences=8,
        micro_batch_sequences=2,
        seed=1,
        optim=OptimConfig(lr=1e-4),
    )


FULL = _config(d_model=256, d_expert=256, vocab_size=4096, seq_len=256)
QUICK = _config(d_model=128, d_expert=32, vocab_size=64, seq_len=16)
QUICK_AXES = ("zero 3", "tp", "ep")


def run(quick: bool, progress: Callable[[str], None]) -> Result:
    config = QUICK if quick else FULL
    axes = {name: AXES[name] for name in (QUICK_AXES if quick else AXES)}
    rows: list[Mapping[str, Cell]] = list(
        compare(config, axes, rounds=1 if quick else 5, steps=2 if quick else 4, progress=progress)
    )
    headline = _headline(rows)
    headline |= {"combinations_refused": float(len(refused_layouts()))}
    figures = reported_figures()
    if not quick and "combinations_passed" not in figures:
        layouts = compare_layouts(progress)
        rows += layouts
        figures |= {
            "combinations_passed": float(sum(bool(row["passed"]) for row in layouts)),
            "max_relative_error": max(float(row["relative_error"] or 0) for row in layouts),
        }
    return Result(headline=headline | figures, rows=rows)


def compare(
    config: RunConfig,
    axes: Mapping[str, Mapping[str, Any]],
    *,
    rounds: int,
    steps: int,
    progress: Callable[[str], None],
) -> list[dict[str, Cell]]:
    """A row per axis. Each round runs one rank alone, then every axis: only times of one round are compared."""
    tokens = config.train.global_batch_tokens // RANKS
    share = replace(config, train=replace(config.train, global_batch_tokens=tokens))
    alone_ms: list[float] = []
    axis_ms: dict[str, list[float]] = defaultdict(list)
    found: dict[str, dict[str, Cell]] = {}
    for round_ in range(rounds):
        alone_ms.append(statistics.median(run_ranks(time_steps, 1, share, steps)[0]))
        for name, degrees in axes.items():
            layout = replace(config, parallel=ParallelConfig(**degrees))
            ranks = run_ranks(time_steps, RANKS, layout, steps, timeout_s=600.0)
            axis_ms[name].append(max(statistics.median(times) for times in ranks))
            if round_ == 0:
                found[name] = measure_traffic(layout)
        progress(f"round {round_ + 1} of {rounds}: one rank {alone_ms[-1]:.0f} ms")
    return [
        {
            "axis": name,
            "ranks": RANKS,
            "one_rank_does": SHARE,
            "step_ms": statistics.median(axis_ms[name]),
            "one_rank_ms": statistics.median(alone_ms),
            "step_ratio": paired_ratio(axis_ms[name], alone_ms),
            **found[name],
        }
        for name in axes
    ]


def time_steps(rank: int, world_size: int, config: RunConfig, steps: int) -> list[float]:
    """Milliseconds of steps after the first two."""
    run = SmallRun(config, world_size)
    run.step()
    run.step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        run.step()
        times.append((time.perf_counter() - began) * 1e3)
    return times


def measure_traffic(config: RunConfig) -> dict[str, Cell]:
    """Bytes of a step, by the rank that sends most, counted and by formula; and overlap."""
    ranks = run_ranks(traffic_job, RANKS, config, timeout_s=600.0)
    slots = [decided for _, decided, _ in ranks]
    counted = [sum(sent.values()) for sent, _, _ in ranks]
    expected = [formula(config, RANKS, rank, slots) for rank in range(RANKS)]
    is_exact = all(sent == want for (sent, _, _), want in zip(ranks, expected, strict=True))
    most = max(range(RANKS), key=lambda rank: counted[rank])
    exposed_ms, calls_alone_ms = (max(times) for times in zip(*(t for *_, t in ranks), strict=True))
    is_pipeline = config.parallel.pp > 1
    return {
        "sent_bytes": int(counted[most]),
        "formula_bytes": int(sum(expected[most].values())),
        "exact_on_all_ranks": is_exact,
        "exposed_ms": exposed_ms,
        "alone_ms": calls_alone_ms,
        "overlap": None if is_pipeline else max(0.0, 1 - exposed_ms / calls_alone_ms),
    }


def traffic_job(rank: int, world_size: int, config: RunConfig) -> tuple[Any, Any, Any]:
    """Bytes, routing, and (exposed, alone) milliseconds of a step."""
    run = SmallRun(config, world_size)
    run.step()
    return *count_step(run), overlap(run.step)


def refused_layouts() -> list[str]:
    """Wrong layouts that checking the configuration refuses, naming the key."""
    from tests.config.prepared import prepared_data
    from tests.config.test_wrong_layouts import WRONG
    from tests.config.wrong import refused

    with tempfile.TemporaryDirectory(prefix="moesys_bench_") as folder:
        data = prepared_data(Path(folder) / "data")
        return [
            wrong.overrides
            for wrong in WRONG
            if any(
                problem.key == wrong.key
                for problem in refused(wrong.overrides.split(" "), wrong.world_size, data)
            )
        ]


def compare_layouts(
    progress: Callable[[str], None], names: Sequence[str] | None = None
) -> list[dict[str, Cell]]:
    """Every layout of the parity suite against one process."""
    reference = parity(BASE, 1, MICRO_STEPS)[0]
    rows: list[dict[str, Cell]] = []
    for name in names or LAYOUTS:
        world_size, degrees = LAYOUTS[name]
        config = replace(BASE, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
        difference = difference_of(parity(config, world_size, MICRO_STEPS, 600.0), reference)
        passed = difference.worst < MAX_ERROR and difference.weights < MAX_WEIGHT_ERROR
        rows.append(
            {
                "layout": name,
                "ranks": world_size,
                "relative_error": max(difference.figures, difference.gradients),
                "worst_gradient": difference.gradient_name,
                "passed": passed,
            }
        )
        progress(f"{name}: {'passed' if passed else 'FAILED'}, {difference.worst:.1e}")
    return rows


def reported_figures() -> dict[str, float]:
    """What tests/figures.py wrote while suites ran, if MOESYS_FIGURES names its file."""
    from tests.figures import read_figures

    path = os.environ.get("MOESYS_FIGURES")
    return read_figures(Path(path)) if path else {}


def _headline(rows: Sequence[Mapping[str, Cell]]) -> dict[str, float]:
    ratios = [float(row["step_ratio"] or 0) for row in rows]
    overlaps = [float(row["overlap"]) for row in rows if row["overlap"] is not None]
    return {
        "axes_with_exact_bytes": float(sum(bool(row["exact_on_all_ranks"]) for row in rows)),
        "max_step_ratio": max(ratios),
        "max_overlap": max(overlaps),
    }
