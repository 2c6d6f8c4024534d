"""Steps of a training on an emulated cluster of four nodes with two ranks each, where the network is slow.

The uplinks are shaped so that what crosses them makes up 45 %, then 70 % of a plain step, measured as the time by which the step is
longer than on uplinks without a limit. All variants then run in one job, in turns, from trained weights: how many rows a codec
makes is that of a model that has learnt.
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.fabric.job import run_job
from benchmarks.fabric.layout import Layout
from benchmarks.fabric.network import fabric
from benchmarks.results import Cell

LAYOUT = Layout(name="compression", num_nodes=4, ranks_per_node=2)
PLAIN = "none"
VARIANTS = {
    PLAIN: [],
    "int8": ["codec=int8"],
    "int4": ["codec=int4"],
    "fp8": ["codec=fp8"],
    "lsh": ["codec=lsh"],
    "lsh_int8": ["codec=lsh_int8"],
    "lsh_int4": ["codec=lsh_int4"],
    "hierarchical": ["dispatch.exchange=hierarchical"],
    "deduplicated": ["dispatch.exchange=deduplicated"],
    "deduplicated int8": ["dispatch.exchange=deduplicated", "codec=int8"],
    "hierarchical lsh_int8": ["dispatch.exchange=hierarchical", "codec=lsh_int8"],
    "hierarchical lsh_int4": ["dispatch.exchange=hierarchical", "codec=lsh_int4"],
}
LAYERS = (PLAIN, "int8", "lsh_int8", "lsh_int4")
DEEPSPEED = "deepspeed"
TRIES = 3
"""To find a rate."""

Numbers = Mapping[str, float]
"""Of one variant, medians over rounds: step_ms, between_nodes_bytes, rows, codec_ms."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how long each variant is measured."""

    model: str
    words: Sequence[str]
    """Overrides of all variants."""
    names: Sequence[str] = tuple(VARIANTS)
    rounds: int = 4
    warm_steps: int = 3
    tries: int = TRIES


def speed_rows(
    case: Case, shares: Sequence[int], progress: Callable[[str], None]
) -> list[dict[str, Cell]]:
    """A row for each share of a plain step, in percent, that crossing the uplinks takes, and variant; then for each share and
    layer, ours and DeepSpeed's."""
    free = _measured(LAYOUT, case, [PLAIN], progress)[PLAIN]
    steps: list[dict[str, Cell]] = []
    layers: list[dict[str, Cell]] = []
    for share in shares:
        layout = _shaped(case, free, share, progress)
        found = _measured(layout, case, case.names, progress)
        steps += [_row(case, share, layout, name, found, free) for name in case.names]
        layers += _layer_rows(case, share, layout, progress)
    return [*steps, *layers]


def rate_for(share_pct: float, free_ms: float, uplink_bytes: float) -> float:
    """Bits per second at which so many bytes of a step take this share of it, if nothing else overlaps them. Pure."""
    extra_ms = free_ms * share_pct / (100 - share_pct)
    return uplink_bytes * 8 / (extra_ms / 1e3)


def corrected(rate_bits: float, share_pct: float, free_ms: float, step_ms: float) -> float:
    """The rate after one that gave steps of `step_ms`: what is added goes with one over the rate. Pure."""
    wanted_ms = free_ms * share_pct / (100 - share_pct)
    return rate_bits * max(step_ms - free_ms, 0.1 * wanted_ms) / wanted_ms


def codec_cost_pct(codec_ms: float, step_ms: float, plain_ms: float) -> float | None:
    """Of the time that the variant would save if its codec took none; None where it would save none. Pure."""
    saved_ms = plain_ms - (step_ms - codec_ms)
    return 100 * codec_ms / saved_ms if saved_ms > 0 else None


def _shaped(case: Case, free: Numbers, share: int, progress: Callable[[str], None]) -> Layout:
    """With uplinks at which a plain step has the share."""
    rate = rate_for(share, free["step_ms"], free["between_nodes_bytes"] / LAYOUT.num_nodes)
    for _ in range(case.tries):
        layout = replace(LAYOUT, inter_bits=math.ceil(rate))
        found = _measured(layout, case, [PLAIN], progress)[PLAIN]
        reached = 100 * (1 - free["step_ms"] / found["step_ms"])
        progress(f"uplinks of {rate / 1e6:.1f} Mbit/s take {reached:.0f} % of a plain step")
        if abs(reached - share) <= 2:
            break
        rate = corrected(rate, share, free["step_ms"], found["step_ms"])
    return replace(LAYOUT, inter_bits=math.ceil(rate))


def _measured(
    layout: Layout, case: Case, names: Sequence[str], progress: Callable[[str], None]
) -> dict[str, Numbers]:
    """Steps of the variants."""
    return _job(layout, "steps", case, names, [case.rounds, case.warm_steps], progress)


def _layer_rows(
    case: Case, share: int, layout: Layout, progress: Callable[[str], None]
) -> list[dict[str, Cell]]:
    """Of one MoE layer of each of `LAYERS` and of DeepSpeed's, forward and backward."""
    names = [name for name in LAYERS if name in case.names]
    found = _job(layout, "layers", case, names, [max(3, 2 * case.rounds)], progress)
    theirs_ms = found[DEEPSPEED]["layer_ms"]
    return [
        {
            "layer": name,
            "of_model": case.model,
            "uplinks_pct": share,
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
    said: list[str] = []

    def say(rank: int, line: str) -> None:
        if rank != 0 or not line.startswith("{"):
            said.append(f"[{rank}] {line}")
            return
        record = json.loads(line)
        name = record.pop("variant")
        progress(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in record.items()))
        for key, value in record.items():
            found[name][key].append(value)

    with fabric(layout):
        status = run_job(layout, words, timeout_s=1800.0, say=say)
    if status:
        raise RuntimeError(f"ranks ended with {status}:\n" + "\n".join(said[-20:]))
    return {
        name: {key: statistics.median(values) for key, values in numbers.items()}
        for name, numbers in found.items()
    }


def _row(
    case: Case,
    share: int,
    layout: Layout,
    name: str,
    found: Mapping[str, Numbers],
    free: Numbers,
) -> dict[str, Cell]:
    own, plain = found[name], found[PLAIN]
    assert layout.inter_bits is not None
    cost = codec_cost_pct(own["codec_ms"], own["step_ms"], plain["step_ms"])
    return {
        "model": case.model,
        "uplinks_pct": share,
        "uplink_mbit": round(layout.inter_bits / 1e6, 2),
        "variant": name,
        "step_ms": round(own["step_ms"], 1),
        "step_speedup": round(plain["step_ms"] / own["step_ms"], 3),
        "uplinks_share_pct": round(100 * (1 - free["step_ms"] / plain["step_ms"]), 1),
        "uplink_bytes_pct": round(
            100 * own["between_nodes_bytes"] / plain["between_nodes_bytes"], 2
        ),
        "rows_pct": round(100 * own["rows"], 2),
        "codec_ms": round(own["codec_ms"], 2),
        "codec_cost_pct": None if cost is None or name == PLAIN else round(cost, 2),
    }
