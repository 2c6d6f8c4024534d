"""Steps under one routing, with experts placed by several policies in turns: what speed.py runs as every rank of a fabric.

Rank 0 prints a line of JSON for every variant and step. The first step knows no loads and is not told.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.variants import Variant, build_variants
from moesys.parallel.bootstrap import process_group


class PlacedVariant(Variant):
    """With what copies do."""

    def measure(self) -> dict[str, Any]:
        """A step, in milliseconds, rows and bytes."""
        result, step_ms = self.timed_step()
        placed = result.placement
        owners = busiest_owner(result.expert_load_ME, self.run.meshes.dims.ep)
        return {
            "variant": self.name,
            "step": self.steps,
            "step_ms": step_ms,
            "owner_over_mean": owners,
            "max_over_mean": owners if placed is None else statistics.fmean(placed.busiest_rank_M),
            "rows_between_bytes": result.between_nodes_bytes,
            "copies_between_bytes": 0 if placed is None else placed.between_nodes_bytes,
            "wait_ms": 0.0 if placed is None else placed.wait_ms,
        }


def busiest_owner(load_ME: Sequence[Sequence[int]], ranks: int) -> float:
    """Slots of the busiest of ranks with equal runs of experts over the mean; mean over layers. Pure."""
    of_ranks_MP = np.array(load_ME).reshape(len(load_ME), ranks, -1).sum(2)
    return float((of_ranks_MP.max(1) / of_ranks_MP.mean(1)).mean())


def main(variants: dict[str, list[str]], rounds: int) -> None:
    """So many steps of each that are told."""
    with process_group("cpu", timeout_s=600.0) as process:
        built = build_variants(variants, process, PlacedVariant)
        for variant in built:
            variant.step()
        for _ in range(rounds):
            for variant in built:
                found = variant.measure()
                if process.rank == 0:
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
