"""Steps on documents whose batches are planned by several policies in turns: what speed.py runs as every rank of a fabric.

Rank 0 prints a line of JSON for every variant and step. The first step is not told. All policies plan by the same costs, measured
once.
"""

import json
import resource
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.variants import Variant, build_variants
from moesys.data.sequence_loader import SequenceLoader
from moesys.parallel.bootstrap import process_group
from moesys.train.batch_costs import measured_costs


class PlannedVariant(Variant):
    """With what a plan was expected to take."""

    @property
    def loader(self) -> SequenceLoader:
        assert isinstance(self.run.loader, SequenceLoader)
        return self.run.loader

    def measure(self, cores: float | None) -> dict[str, Any]:
        """A step, once its batch is planned and read: a rank's share of a core stands for an accelerator, beside which plans are made.

        `cores` that a rank has: a rank that works uses all of its share.
        """
        batch = self.read()
        dist.barrier()
        began_s, used_s = time.perf_counter(), _processor_s()
        result = self.train(batch)
        took_s = time.perf_counter() - began_s
        used = torch.tensor(_processor_s() - used_s)
        dist.all_reduce(used)
        all_s = took_s * self.run.process.world_size * (cores or 1.0)
        return {
            "variant": self.name,
            "step": self.steps,
            "tokens": result.num_tokens,
            "step_ms": took_s * 1e3,
            "idle_share": max(0.0, 1 - used.item() / all_s),
            **self.loader.plan_fields(),
        }


def _processor_s() -> float:
    """Of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(variants: dict[str, list[str]], rounds: int, cores: float | None) -> None:
    """So many steps of each that are told."""
    with process_group("cpu", timeout_s=600.0) as process:
        built = build_variants(variants, process, PlannedVariant)
        costs = measured_costs(built[0].run, built[0].train_step, torch.float32)
        for variant in built:
            variant.loader.plan_by(costs)
            variant.step()
        for _ in range(rounds):
            for variant in built:
                found = variant.measure(cores)
                if process.rank == 0:
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
