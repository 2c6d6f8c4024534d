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
    "fp8": ["codec=fp8"],
    "lsh": ["codec=lsh"],
    "lsh_int8": ["codec=lsh_int8"],
    "hierarchical": ["dispatch.exchange=hierarchical"],
    "deduplicated": ["dispatch.exchange=deduplicated"],
    "deduplicated int8": ["dispatch.exchange=deduplicated", "codec=int8"],
    "hierarchical lsh_int8": ["dispatch.exchange=hierarchical", "codec=lsh_int8"],
}
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
    """A row for each share of a plain step, in percent, that crossing the uplinks takes, and variant."""
    free = _measured(LAYOUT, case, [PLAIN], progress)[PLAIN]
    rows: list[dict[str, Cell]] = []
    for share in shares:
        layout = _shaped(case, free, share, progress)
        found = _measured(layout, case, case.names, progress)
        rows += [_row(case, share, layout, name, found, free) for name in case.names]
    return rows


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
    variants = {name: [*case.words, *VARIANTS[name]] for name in names}
    words = [sys.executable, "-m", "benchmarks.compression.steps", json.dumps(variants)]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    said: list[str] = []

    def say(rank: int, line: str) -> None:
        if rank == 0 and line.startswith("{"):
            record = json.loads(line)
            progress(f"{record['variant']}: {record['step_ms']:.0f} ms")
            for key, value in record.items():
                if key not in ("variant", "round"):
                    found[record["variant"]][key].append(value)
        else:
            said.append(f"[{rank}] {line}")

    words += [str(case.rounds), str(case.warm_steps)]
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
