"""What fewer bytes gain where the network is slow: steps of quickstart on an emulated cluster of four nodes with two ranks each.

The uplinks are shaped so that what crosses them makes up 45 %, then 70 % of a plain step, measured as the time by which the step is
longer than on uplinks without a limit. All variants then run in one job, in turns. Needs root, as `moesys-fabric` does.
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.fabric.job import run_job
from benchmarks.fabric.layout import Layout
from benchmarks.fabric.network import fabric
from benchmarks.results import Cell, Result

DESCRIPTION = (
    "step time, bytes and rows by codec and exchange, where plain rows take 45 % and 70 % of a step"
)
RESULT = "compression"
LAYOUT = Layout(name="compression", num_nodes=4, ranks_per_node=2)
BASE = [
    *("experiment=quickstart", "parallel.ep=8", "train.micro_batch_tokens=512"),
    *("checkpoint.every_steps=0", "model.moe.expert_backend=loop"),
]
SHARES = (45, 70)
"""Of a plain step, in percent, that crossing the uplinks takes: the mean and the worst of 2411.08446."""
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
QUICK_VARIANTS = (PLAIN, "lsh_int8")
QUICK = ["model.num_layers=2", "train.global_batch_tokens=2048", "train.micro_batch_tokens=256"]
TRIES = 3
"""To find a rate."""


def run(quick: bool, progress: Callable[[str], None]) -> Result:
    """About half an hour on two cores; quick: two variants of a smaller model at one rate."""
    base = [*BASE, *(QUICK if quick else [])]
    rounds, warm_steps = (1, 1) if quick else (4, 3)
    free = _measured(LAYOUT, [*base], [PLAIN], rounds, warm_steps, progress)[PLAIN]
    rows: list[dict[str, Cell]] = []
    for share in SHARES[:1] if quick else SHARES:
        layout = _shaped(base, free, share, 1 if quick else TRIES, rounds, warm_steps, progress)
        names = QUICK_VARIANTS if quick else tuple(VARIANTS)
        found = _measured(layout, base, names, rounds, warm_steps, progress)
        rows += [_row(share, layout, name, found, free) for name in names]
    return Result(headline=headlines(rows), rows=rows, is_whole=False)


def headlines(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The best of each share, by the time of a step alone. Pure."""
    found: dict[str, float] = {}
    for share in sorted({row["uplinks_pct"] for row in rows}):
        found[f"step_speedup_at_{share}pct"] = max(
            row["speedup"] for row in rows if row["uplinks_pct"] == share
        )
    found["uplink_bytes_pct"] = min(row["uplink_bytes_pct"] for row in rows)
    return found


def rate_for(share_pct: float, free_ms: float, uplink_bytes: float) -> float:
    """Bits per second at which so many bytes of a step take this share of it, if nothing else overlaps them. Pure."""
    extra_ms = free_ms * share_pct / (100 - share_pct)
    return uplink_bytes * 8 / (extra_ms / 1e3)


def corrected(rate_bits: float, share_pct: float, free_ms: float, step_ms: float) -> float:
    """The rate after one that gave steps of `step_ms`: what is added goes with one over the rate. Pure."""
    wanted_ms = free_ms * share_pct / (100 - share_pct)
    return rate_bits * max(step_ms - free_ms, 0.1 * wanted_ms) / wanted_ms


def _shaped(
    base: Sequence[str],
    free: Mapping[str, float],
    share: int,
    tries: int,
    rounds: int,
    warm_steps: int,
    progress: Callable[[str], None],
) -> Layout:
    """With uplinks at which a plain step has the share."""
    rate = rate_for(share, free["step_ms"], free["between_nodes_bytes"] / LAYOUT.num_nodes)
    for _ in range(tries):
        layout = replace(LAYOUT, inter_bits=math.ceil(rate))
        found = _measured(layout, base, [PLAIN], rounds, warm_steps, progress)[PLAIN]
        reached = 100 * (1 - free["step_ms"] / found["step_ms"])
        progress(f"uplinks of {rate / 1e6:.1f} Mbit/s take {reached:.0f} % of a plain step")
        if abs(reached - share) <= 2:
            break
        rate = corrected(rate, share, free["step_ms"], found["step_ms"])
    return replace(LAYOUT, inter_bits=math.ceil(rate))


def _measured(
    layout: Layout,
    base: Sequence[str],
    names: Sequence[str],
    rounds: int,
    warm_steps: int,
    progress: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Of each variant: the median over rounds of each number."""
    variants = {name: [*base, *VARIANTS[name]] for name in names}
    words = [sys.executable, "-m", "benchmarks.compressed_steps", json.dumps(variants)]
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

    with fabric(layout):
        status = run_job(layout, [*words, str(rounds), str(warm_steps)], timeout_s=1800.0, say=say)
    if status:
        raise RuntimeError(f"ranks ended with {status}:\n" + "\n".join(said[-20:]))
    return {
        name: {key: statistics.median(values) for key, values in numbers.items()}
        for name, numbers in found.items()
    }


def _row(
    share: int,
    layout: Layout,
    name: str,
    found: Mapping[str, Mapping[str, float]],
    free: Mapping[str, float],
) -> dict[str, Cell]:
    own, plain = found[name], found[PLAIN]
    assert layout.inter_bits is not None
    return {
        "uplinks_pct": share,
        "uplink_mbit": round(layout.inter_bits / 1e6, 2),
        "variant": name,
        "step_ms": round(own["step_ms"], 1),
        "speedup": round(plain["step_ms"] / own["step_ms"], 3),
        "uplinks_share_pct": round(100 * (1 - free["step_ms"] / plain["step_ms"]), 1),
        "between_nodes_bytes": int(own["between_nodes_bytes"]),
        "uplink_bytes_pct": round(
            100 * own["between_nodes_bytes"] / plain["between_nodes_bytes"], 2
        ),
        "rows_pct": round(100 * own["rows"], 2),
    }
