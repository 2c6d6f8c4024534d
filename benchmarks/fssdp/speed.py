"""Steps of a training on an emulated cluster of four nodes with two ranks each, where experts are placed by several policies.

Each rank computes with its share of a core, so that one with more rows takes longer. The uplinks are shaped so that with loads that
are all alike exchanges of rows make up 45 % of a plain step. Under each routing all policies then run in one job, in turns.
"""

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.fabric.layout import Layout
from benchmarks.fabric.told import told_by_rank_0
from benchmarks.fssdp.simulated import OWNERS_STEPS
from benchmarks.fssdp.traces import Loads, write_run
from benchmarks.kept import KeptParts
from benchmarks.results import Cell
from benchmarks.shaping import STAYING, Crossing, Shaping, StepTimes

LAYOUT = Layout(name="fssdp", num_nodes=4, ranks_per_node=2, cores_per_rank=0.22)
PLAIN = "fixed"
OURS = "balanced"
COPIES = "placement.copies=4"
PLACED = {
    PLAIN: [],
    OURS: ["placement=balanced", COPIES],
    "balanced, not calibrated": ["placement=balanced", COPIES, "placement.calibrate=false"],
    "hecate": ["placement=hecate", COPIES],
    "everywhere": ["placement=everywhere", COPIES],
    "eplb": ["placement=eplb", COPIES],
}
"""Overrides of each."""
OWNERS_STAY = (PLAIN, "everywhere")
UNIFORM = "uniform"
FIRST_STEPS = 2
"""The first step knows no loads, and before the second all is placed for the first time."""
TRIES, SHAPING_STEPS = 3, 5
"""To find the uplinks' rate."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and for how long."""

    words: Sequence[str]
    """Overrides of all policies."""
    share_pct: float
    """Of a plain step, that exchanges of rows are to take under loads that are alike."""
    rounds: Mapping[str, int]
    """A step of each policy, by routing; of others as many as by the empty name."""
    names: Sequence[str] = tuple(PLACED)
    inter_bits: int | None = None
    """Of the uplinks, in the place of those that make the share."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Of one policy under one routing, means over steps."""

    step_ms: float
    owner_over_mean: float
    max_over_mean: float
    rows_between_bytes: float
    copies_between_bytes: float
    wait_ms: float


def speed_rows(
    case: Case, traces: Mapping[str, Loads], kept: KeptParts, progress: Callable[[str], None]
) -> list[dict[str, Cell]]:
    """A row for each routing and policy. What is `kept` is not measured again."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            name: write_run(Path(scratch, f"run{index}"), loads_SME)
            for index, (name, loads_SME) in enumerate(traces.items())
        }
        if kept.get("uplinks") is None:
            kept.put("uplinks", _shaped(case, runs[UNIFORM], progress))
        inter_bits, share_pct = kept.get("uplinks")
        layout = replace(LAYOUT, inter_bits=inter_bits)
        progress(f"uplinks of {inter_bits / 1e6:.1f} Mbit/s: rows take {share_pct:.1f} % of a step")
        rows = []
        for name, run in runs.items():
            if (told := kept.get(name)) is None:
                steps = FIRST_STEPS - 1 + case.rounds.get(name, case.rounds[""])
                told = _job(layout, case, case.names, run, steps, progress)
                kept.put(name, told)
            rows += routing_rows(name, share_pct, layout, placed(told))
            for row in rows[-len(case.names) :]:
                progress(f"{name}: {row['placement']} {row['speedup']} times as fast as {PLAIN}")
    return rows


def placed(told: Sequence[Mapping[str, Any]]) -> dict[str, Placed]:
    """Means by policy. What it takes to move experts to other owners, the first time being as good as any, is shared out over the
    steps between two looks for such. Pure."""
    by_name: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in told:
        by_name[record["variant"]].append(record)
    found = {}
    for name, (first, *later) in by_name.items():
        means = {
            key: statistics.fmean(record[key] for record in later)
            for key in Placed.__dataclass_fields__
        }
        if name not in OWNERS_STAY:
            means["step_ms"] += max(0.0, first["step_ms"] - means["step_ms"]) / OWNERS_STEPS
        found[name] = Placed(**means)
    return found


def routing_rows(
    routing: str, share_pct: float, layout: Layout, found: Mapping[str, Placed]
) -> list[dict[str, Cell]]:
    """A row for each policy. Pure."""
    plain = found[PLAIN]
    assert layout.inter_bits is not None
    return [
        {
            "routing": routing,
            "placement": name,
            "exchange_pct": round(share_pct, 1),
            "uplink_mbit": round(layout.inter_bits / 1e6, 2),
            "step_ms": round(one.step_ms, 1),
            "speedup": round(plain.step_ms / one.step_ms, 3),
            "owner_over_mean": round(one.owner_over_mean, 3),
            "max_over_mean": round(one.max_over_mean, 3),
            "rows_between_mib": round(one.rows_between_bytes / 2**20, 2),
            "copies_between_mib": round(one.copies_between_bytes / 2**20, 2),
            "wait_ms": round(one.wait_ms, 1),
        }
        for name, one in found.items()
    ]


def _shaped(case: Case, uniform: Path, progress: Callable[[str], None]) -> tuple[int, float]:
    """Rate of an uplink, and the share of a plain step that exchanges of rows then were found to take."""

    told: list[dict[str, Any]] = []

    def measure(layout: Layout) -> StepTimes:
        """Medians: a machine that others share has slow moments."""
        told[:] = _job(layout, case, (PLAIN, STAYING), uniform, SHAPING_STEPS, progress)
        plain_ms, staying_ms = (
            statistics.median(one["step_ms"] for one in told if one["variant"] == name)
            for name in (PLAIN, STAYING)
        )
        return StepTimes(plain_ms=plain_ms, staying_ms=staying_ms)

    layout = replace(LAYOUT, inter_bits=case.inter_bits)
    if case.inter_bits is None:
        free, between = measure(LAYOUT), told[0]["rows_between_bytes"]
        shaping = Shaping(
            layout=LAYOUT,
            measure=measure,
            free=free,
            guess=Crossing(rate_bits=8 * between / LAYOUT.num_nodes, rows_ms=1e3),
            tries=TRIES,
            progress=progress,
        )
        layout = shaping.to(case.share_pct)
    assert layout.inter_bits is not None
    return layout.inter_bits, measure(layout).share_pct


def _job(
    layout: Layout,
    case: Case,
    names: Sequence[str],
    run: Path,
    rounds: int,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """What rank 0 tells of each variant's steps."""
    words = [*case.words, "router=replay_loads", f"model.moe.router.run={run}"]
    variants = {name: [*words, *PLACED.get(name, [])] for name in names}
    told: list[dict[str, Any]] = []

    def each(record: dict[str, Any]) -> None:
        progress(
            f"step {record['step']}, {record['variant']}: {record['step_ms']:.0f} ms, busiest rank {record['max_over_mean']:.2f}"
        )
        told.append(record)

    module = [sys.executable, "-m", "benchmarks.fssdp.steps"]
    told_by_rank_0(layout, [*module, json.dumps(variants), str(rounds)], each)
    return told
