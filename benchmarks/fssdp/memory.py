"""The most bytes that live on a rank in a step, with copies of experts and without: what `peak_rows` runs as every rank of a fabric.

Counted, not measured: parameters, optimizer states, and every storage that an operation of the step makes and that still lives.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from benchmarks.fabric.layout import Layout
from benchmarks.fabric.told import told_by_rank_0
from benchmarks.results import Cell
from benchmarks.variants import Variant, build_variants
from moesys.parallel.bootstrap import process_group
from moesys.testing.live_bytes import peak_of_step

KNOWN_STEPS = 2
"""Before the step that is counted."""


class CountedVariant(Variant):
    """Of which the bytes of a step are counted."""

    def peak_bytes(self) -> int:
        return peak_of_step(self.run.model, self.run.optimizer, self.step)


def peak_rows(layout: Layout, variants: Mapping[str, Sequence[str]]) -> list[dict[str, Cell]]:
    """A row for each variant; the first is what the others are over."""
    told: list[dict[str, Any]] = []
    words = [sys.executable, "-m", "benchmarks.fssdp.memory", json.dumps(dict(variants))]
    told_by_rank_0(layout, words, told.append)
    return peak_table({record["variant"]: record["peak_bytes"] for record in told})


def peak_table(peaks: Mapping[str, Sequence[int]]) -> list[dict[str, Cell]]:
    """From the peaks of all ranks. Pure."""
    plain, *_ = peaks.values()
    return [
        {
            "in memory": name,
            "mean_mib": round(sum(peak_P) / len(peak_P) / 2**20, 2),
            "mean_over_plain_pct": round(100 * (sum(peak_P) / sum(plain) - 1), 2),
            "fullest_mib": round(max(peak_P) / 2**20, 2),
            "fullest_over_plain_pct": round(100 * (max(peak_P) / max(plain) - 1), 2),
        }
        for name, peak_P in peaks.items()
    ]


def main(variants: dict[str, list[str]]) -> None:
    with process_group("cpu", timeout_s=600.0) as process:
        for variant in build_variants(variants, process, CountedVariant):
            for _ in range(KNOWN_STEPS):
                variant.step()
            peak_P = [0] * dist.get_world_size()
            dist.all_gather_object(peak_P, variant.peak_bytes())
            if process.rank == 0:
                print(json.dumps({"variant": variant.name, "peak_bytes": peak_P}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
