"""Steps of a training on an emulated cluster of four nodes with two ranks each, where the network is slow.

The uplinks are shaped so that the exchange of rows makes up 45 %, then 70 % of a plain step: by so much it is longer than one whose
rows stay where they are, while gradients still cross. All variants then run in one job, in turns, from trained weights: how many
rows a codec makes is that of a model that has learnt.
"""

import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.compression.quality import PLAIN
from benchmarks.fabric.layout import Layout
from benchmarks.fabric.told import told_by_rank_0
from benchmarks.results import ROOT, Cell
from benchmarks.shaping import STAYING, Crossing, Shaping, StepTimes

LAYOUT = Layout(name="compression", num_nodes=4, ranks_per_node=2)
VARIANTS = {
    PLAIN: [],
    STAYING: [],
    "int8": ["codec=int8"],
    "int4": ["codec=int4"],
    "fp8": ["codec=fp8"],
    "lsh": ["codec=lsh"],
    "lsh_int8": ["codec=lsh_int8"],
    "lsh_int4": ["codec=lsh_int4"],
    "tree_int4": ["codec=tree_int4"],
    "hierarchical": ["dispatch.exchange=hierarchical"],
    "deduplicated": ["dispatch.exchange=deduplicated"],
    "hierarchical tree_int4": ["dispatch.exchange=hierarchical", "codec=tree_int4"],
}
LAYERS = (PLAIN, "int8", "lsh_int8", "lsh_int4", "tree_int4")
DEEPSPEED = "deepspeed"
TRIES = 3
"""To find a rate, each with so many times the rounds of what is measured at it."""
TRY_ROUNDS = 2

Numbers = Mapping[str, float]
"""Of one variant, medians over rounds: step_ms, between_nodes_bytes, rows, codec_ms."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how long each variant is measured."""

    model: str
    words: Sequence[str]
    """Overrides of all variants."""
    shares_pct: Sequence[int]
    """Of a plain step, that exchanges of rows are to take."""
    names: Sequence[str] = tuple(VARIANTS)
    rounds: int = 3
    """A step of each variant."""
    tries: int = TRIES


def speed_rows(case: Case, progress: Callable[[str], None]) -> list[dict[str, Cell]]:
    """A row for each share and variant; then for each share and layer, ours and DeepSpeed's."""
    found = _measured(LAYOUT, case, (PLAIN, STAYING), progress)
    longer = replace(case, rounds=TRY_ROUNDS * case.rounds)
    uplink_bits = 8 * found[PLAIN]["between_nodes_bytes"] / LAYOUT.num_nodes
    shaping = Shaping(
        layout=LAYOUT,
        measure=lambda layout: _times(_measured(layout, longer, (PLAIN, STAYING), progress)),
        free=_times(found),
        guess=Crossing(rate_bits=uplink_bits, rows_ms=1e3),
        tries=case.tries,
        progress=progress,
    )
    steps: list[dict[str, Cell]] = []
    layers: list[dict[str, Cell]] = []
    for share_pct in case.shares_pct:
        layout = shaping.to(share_pct)
        found = _measured(layout, case, case.names, progress)
        steps += [_row(case, share_pct, layout, name, found) for name in case.names]
        layers += _layer_rows(case, share_pct, layout, progress)
    return [*steps, *layers]


def codec_cost_pct(codec_ms: float, step_ms: float, plain_ms: float) -> float | None:
    """Of the time that the variant would save if its codec took none; None where it would save none. Pure."""
    saved_ms = plain_ms - (step_ms - codec_ms)
    return 100 * codec_ms / saved_ms if saved_ms > 0 else None


def _times(found: Mapping[str, Numbers]) -> StepTimes:
    return StepTimes(plain_ms=found[PLAIN]["step_ms"], staying_ms=found[STAYING]["step_ms"])


def _measured(
    layout: Layout, case: Case, names: Sequence[str], progress: Callable[[str], None]
) -> dict[str, Numbers]:
    """Steps of the variants."""
    return _job(layout, "steps", case, names, [case.rounds], progress)


def _layer_rows(
    case: Case, share_pct: int, layout: Layout, progress: Callable[[str], None]
) -> list[dict[str, Cell]]:
    """Of one MoE layer of each of `LAYERS` and of DeepSpeed's, forward and backward."""
    names = [name for name in LAYERS if name in case.names]
    found = _job(layout, "layers", case, names, [max(3, 2 * case.rounds)], progress)
    theirs_ms = found[DEEPSPEED]["layer_ms"]
    return [
        {
            "layer": name,
            "of_model": case.model,
            "exchange_pct": share_pct,
            "layer_ms": round(numbers["layer_ms"], 1),
            "speedup_over_deepspeed": round(theirs_ms / numbers["layer_ms"], 3),
        }
        for name, numbers in found.items()
    ]


def _job(
    layout: Layout,
    program: str,
    case: Case,
    names: Sequence[str],
    numbers: Sequence[int],
    progress: Callable[[str], None],
) -> dict[str, Numbers]:
    """Run a module of this folder as every rank; medians of the lines that rank 0 prints, by variant."""
    variants = {name: [*case.words, *VARIANTS[name]] for name in names}
    module = f"benchmarks.compression.{program}"
    words = [sys.executable, "-m", module, json.dumps(variants), *map(str, numbers)]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def each(record: dict[str, Any]) -> None:
        name = record.pop("variant")
        progress(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in record.items()))
        for key, value in record.items():
            found[name][key].append(value)

    environ = os.environ | {"TORCH_EXTENSIONS_DIR": str(_extensions_folder())}
    told_by_rank_0(layout, words, each, environ)
    return {
        name: {key: statistics.median(values) for key, values in numbers.items()}
        for name, numbers in found.items()
    }


def _extensions_folder() -> Path:
    """Where DeepSpeed builds what it needs. A job that is killed meanwhile leaves a lock that every later one would wait for."""
    folder = ROOT / "build" / "torch_extensions"
    for lock in folder.glob("**/lock"):
        lock.unlink()
    return folder


def _row(
    case: Case, share_pct: int, layout: Layout, name: str, found: Mapping[str, Numbers]
) -> dict[str, Cell]:
    own, plain = found[name], found[PLAIN]
    assert layout.inter_bits is not None
    cost = codec_cost_pct(own["codec_ms"], own["step_ms"], plain["step_ms"])
    return {
        "model": case.model,
        "exchange_pct": share_pct,
        "reached_pct": round(_times(found).share_pct, 1),
        "uplink_mbit": round(layout.inter_bits / 1e6, 2),
        "variant": name,
        "step_ms": round(own["step_ms"], 1),
        "step_speedup": round(plain["step_ms"] / own["step_ms"], 3),
        "uplink_bytes_pct": round(
            100 * own["between_nodes_bytes"] / plain["between_nodes_bytes"], 2
        ),
        "rows_pct": round(100 * own["rows"], 2),
        "codec_ms": round(own["codec_ms"], 2),
        "codec_cost_pct": None if cost is None or not own["codec_ms"] else round(cost, 2),
    }
