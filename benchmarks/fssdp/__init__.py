"""Experts placed where the load is: how much faster steps get, what it costs in memory, and how it goes on with more ranks.

Parts, each kept when others are measured: `speed` and `memory` run on an emulated cluster (speed.py, memory.py) and need root, as
`moesys-fabric` does; `predictors` and `simulated` are computed. The recorded routing is that of a run which the benchmark of
compression keeps in runs/compression_loss.sweep.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compression import LOSS_VARIANTS
from benchmarks.compression.quality import LOSS_WORDS
from benchmarks.compression.quality import PLAIN as PLAIN_RUN
from benchmarks.fssdp.memory import peak_rows
from benchmarks.fssdp.picture import draw
from benchmarks.fssdp.predictors import predictor_rows
from benchmarks.fssdp.simulated import simulated_rows
from benchmarks.fssdp.speed import (
    FIRST_STEPS,
    LAYOUT,
    OURS,
    PLACED,
    PLAIN,
    UNIFORM,
    Case,
    speed_rows,
)
from benchmarks.fssdp.traces import Loads, recorded, synthetic, write_run
from benchmarks.kept import KeptParts
from benchmarks.own_text import VOCAB_SIZE, prepared
from benchmarks.results import ROOT, Cell, Result, rows_of_other_parts
from benchmarks.swept import kept_folder, run_folders, sweep
from moesys.config.placement_schema import PlacementConfig
from moesys.plan.expert_copies import planned_placements

DESCRIPTION = "copies of hot experts: steps under skewed, moving and recorded routing, memory, predictors, and larger clusters simulated"
RESULT = "fssdp"
PARTS = {
    "speed": ["routing"],
    "memory": ["in memory"],
    "predictors": ["loads"],
    "simulated": ["cluster"],
    "plan": ["planned layers"],
}
"""And the first columns of their rows."""
WORDS = [
    *("experiment=quickstart", f"model.vocab_size={VOCAB_SIZE}", "parallel.ep=8", "optim.lr=1e-4"),
    *("model.num_layers=3", "model.num_dense_layers=0", "model.moe.num_shared_experts=0"),
    *("model.d_model=128", "model.num_heads=2", "model.num_kv_heads=1", "model.moe.d_expert=512"),
    *("train.global_batch_tokens=32768", "train.micro_batch_tokens=4096"),
    *("schedule.warmup_steps=1", "checkpoint.every_steps=0", "model.moe.expert_backend=loop"),
]
"""Routed experts do about 70 % of what a rank computes, as in large models: a small one's vocabulary, and its narrow attention, would
be most of it. With loads that are alike a node has 1.33 times the rows for an expert that a copy and its gradient weigh."""
QUICK_LAYERS = 2
QUICK_WORDS = [
    f"model.num_layers={QUICK_LAYERS}",
    "train.global_batch_tokens=2048",
    "train.micro_batch_tokens=256",
    "model.moe.d_expert=32",
]
"""Copies are as much lighter as there are fewer rows."""
QUICK_BITS = 200_000_000
LAYERS, EXPERTS = 3, 16
"""As quickstart, whose loads are played again."""
SHARE_PCT = 45
ROUNDS = {"": 6, UNIFORM: 16}
WINDOWS = (20, 60, 200)
"""Steps of the recorded run from which it is played again: when experts specialise, and later."""
SKEWED, WINDOW = "zipf 1.2", "recorded, from step "
SHOWN_RANKS = (64, 512, 4096)
PLANS = ((12, 64, 32), (58, 256, 64), (64, 256, 2048))
"""Layers, experts and ranks."""
TEXT = ROOT / "build" / "bench-text"
PICTURE = ROOT / "docs" / "placement_simulated.svg"


def run(quick: bool, progress: Callable[[str], None], only: Sequence[str] = tuple(PARTS)) -> Result:
    """About an hour on two cores, nearly all of it `speed`; quick: a few steps of some.

    With `only` some parts, the rows of the others are those of the result that is there.
    """
    rows, sources = rows_of_other_parts(RESULT, PARTS, only, quick)
    if "speed" in only:
        rows += _speed(quick, progress)
    if "memory" in only:
        rows += _memory(quick)
    if "predictors" in only:
        runs = {} if quick else {"quickstart": _recorded_run(progress)}
        rows += predictor_rows(runs)
    if "simulated" in only:
        found = simulated_rows(quick, progress)
        rows += simulated_table(found)
        if not quick:
            PICTURE.write_text(draw(found))
    if "plan" in only:
        rows += plan_rows(PLANS[:1] if quick else PLANS)
    return Result(headline=headlines(rows), rows=rows, is_whole=not quick, sources=sources)


def headlines(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of what is there. Pure."""
    found: dict[str, float] = {}
    ours = {row["routing"]: row for row in rows if row.get("placement") == OURS}
    if SKEWED in ours:
        found["speedup_zipf_1_2"] = ours[SKEWED]["speedup"]
    windows = [row["routing"] for row in rows if str(row.get("routing")).startswith(WINDOW)]
    if windows:
        ms = {
            name: sum(
                row["step_ms"]
                for row in rows
                if row.get("placement") == name and row["routing"] in windows
            )
            for name in (PLAIN, OURS)
        }
        found["speedup_recorded"] = round(ms[PLAIN] / ms[OURS], 3)
    if UNIFORM in ours:
        found["worst_uniform"] = ours[UNIFORM]["speedup"]
    if ours:
        found["max_over_mean_tokens"] = max(row["max_over_mean"] for row in ours.values())
    for row in rows:
        if row.get("in memory") in MEMORY_HEADLINES:
            found[MEMORY_HEADLINES[row["in memory"]]] = row["mean_over_plain_pct"]
        if row.get("ranks_planned") == PLANS[-1][2]:
            found["plan_ms"] = row["plan_ms"]
    return found


MEMORY_HEADLINES = {
    OURS: "memory_overhead_pct",
    f"{OURS}, released": "memory_overhead_released_pct",
}


def simulated_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Cell]]:
    """Speedups of all policies side by side, of some numbers of ranks, and how level ranks are with ours. Pure."""
    table: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for row in rows:
        if row["ranks"] not in SHOWN_RANKS or row["policy"] == PLAIN:
            continue
        at = {key: row[key] for key in ("cluster", "model", "ranks", "zipf")}
        line = table.setdefault(tuple(at.values()), at)
        line[row["policy"]] = row["speedup"]
        if row["policy"] == OURS:
            line |= {key: row[key] for key in ("max_over_mean", "copies_mib_per_rank")}
    return list(table.values())


def plan_rows(plans: Sequence[tuple[int, int, int]]) -> list[dict[str, Cell]]:
    """How long a step's plan takes, of all layers, with loads by Zipf's law, in any order."""
    found: list[dict[str, Cell]] = []
    for layers, experts, ranks in plans:
        rng = np.random.default_rng(0)
        weights_E = 1e6 / np.arange(1, experts + 1)
        loads_M = [rng.permutation(weights_E) for _ in range(layers)]
        owners_M = [
            rng.permutation(np.arange(max(experts, ranks)) % ranks)[:experts] for _ in range(layers)
        ]
        config, took_ms = PlacementConfig(policy="balanced"), []
        for _ in range(15):
            began = time.perf_counter()
            planned_placements(config, loads_M, owners_M, ranks, 8)
            took_ms.append(1e3 * (time.perf_counter() - began))
        found.append(
            {
                "planned layers": layers,
                "experts": experts,
                "ranks_planned": ranks,
                "plan_ms": round(statistics.median(took_ms), 1),
            }
        )
    return found


def _speed(quick: bool, progress: Callable[[str], None]) -> list[dict[str, Cell]]:
    if quick:
        names = (UNIFORM, SKEWED)
        traces = {name: synthetic()[name](FIRST_STEPS + 2, QUICK_LAYERS, EXPERTS) for name in names}
        with tempfile.TemporaryDirectory() as scratch:
            case = Case(
                words=[*_words(Path(scratch, "data")), *QUICK_WORDS],
                share_pct=SHARE_PCT,
                rounds={"": 2},
                names=(PLAIN, OURS),
                inter_bits=QUICK_BITS,
            )
            kept = KeptParts(RESULT, {}, root=Path(scratch))
            return speed_rows(case, traces, kept, progress)
    case = Case(words=_words(TEXT), share_pct=SHARE_PCT, rounds=ROUNDS)
    traces = _traces(_recorded_run(progress))
    kept = KeptParts(RESULT, {"case": dataclasses.asdict(case), "traces": list(traces)})
    rows = speed_rows(case, traces, kept, progress)
    kept.clear()
    return rows


def _words(text: Path) -> list[str]:
    return [*WORDS, f"data.path={prepared(text)}"]


def _traces(run: Path) -> dict[str, Loads]:
    steps = {name: FIRST_STEPS + ROUNDS.get(name, ROUNDS[""]) for name in synthetic()}
    drawn = {name: make(steps[name], LAYERS, EXPERTS) for name, make in synthetic().items()}
    number = FIRST_STEPS + ROUNDS[""]
    return {
        UNIFORM: drawn.pop(UNIFORM),
        SKEWED: drawn.pop(SKEWED),
        **{f"{WINDOW}{first}": recorded(run, first, number) for first in WINDOWS},
        **drawn,
    }


def _memory(quick: bool) -> list[dict[str, Cell]]:
    """Under the most skewed routing."""
    layers = QUICK_LAYERS if quick else LAYERS
    with tempfile.TemporaryDirectory() as scratch:
        run = write_run(Path(scratch, "run"), synthetic()[SKEWED](4, layers, EXPERTS))
        words = [*_words(Path(scratch, "data")), *(QUICK_WORDS if quick else [])]
        words += ["router=replay_loads", f"model.moe.router.run={run}"]
        variants = {
            PLAIN: words,
            OURS: [*words, *PLACED[OURS]],
            f"{OURS}, released": [*words, *PLACED[OURS], "placement.release=true"],
        }
        return peak_rows(LAYOUT, variants)


def _recorded_run(progress: Callable[[str], None]) -> Path:
    """Of quickstart, trained if it was not yet."""
    variants, folder = {PLAIN_RUN: LOSS_VARIANTS[PLAIN_RUN]}, kept_folder("compression_loss")
    run = run_folders(variants, 1, folder)[PLAIN_RUN][0]
    if not (run / "summary.json").exists():
        sweep(variants, LOSS_WORDS, 1, folder, progress)
    return run
