"""Steps of several variants of one training in one job, in turns: what benchmarks/compression.py runs as every rank of a fabric.

Each variant is a run of its own, built from a configuration as `moesys train` builds it; a round is `STEPS` steps of each. Rank 0
prints a line of JSON for every variant and round.
"""

import json
import os
import sys
import time
from typing import Any

import torch.distributed as dist

from moesys.config.compose import compose
from moesys.config.validate import check
from moesys.parallel.bootstrap import process_group
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.train.setup import build_run
from moesys.train.step import TrainStep
from moesys.train.timing import SectionTimer

STEPS = 2


class Variant:
    """One run of the job."""

    def __init__(self, name: str, overrides: list[str], process: Any) -> None:
        config = compose(overrides)
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        check(config, process.world_size, per_node)
        self.name, self.lr, self.steps = name, config.optim.lr, 0
        self.run = build_run(config, process)
        set_expert_backend(self.run.model, "loop")
        run = self.run
        self.train_step = TrainStep(
            run.parallel, run.optimizer, run.meshes, config, SectionTimer(process.device)
        )

    def measure(self, steps: int) -> dict[str, Any]:
        """So many steps: the mean over them, in milliseconds and bytes."""
        took_ms, sent, between, rows, slots, loss = 0.0, 0, 0, 0, 0, 0.0
        for _ in range(steps):
            batches = self.run.loader.next_step()
            self.steps += 1
            dist.barrier()
            began = time.perf_counter()
            result = self.train_step(batches, self.lr, step=self.steps)
            took_ms += (time.perf_counter() - began) * 1e3
            sent, between = sent + result.sent_bytes, between + result.between_nodes_bytes
            rows += sum(result.coded_rows_M)
            slots += sum(map(sum, result.expert_load_ME))
            loss = result.loss
        return {
            "variant": self.name,
            "step_ms": took_ms / steps,
            "sent_bytes": sent // steps,
            "between_nodes_bytes": between // steps,
            "rows": rows / slots if rows else 1.0,
            "loss": loss,
        }


def main(variants: dict[str, list[str]], rounds: int, warm_steps: int) -> None:
    """`warm_steps` of each come first, and are not told."""
    with process_group("cpu", timeout_s=600.0) as process:
        built = [Variant(name, overrides, process) for name, overrides in variants.items()]
        for variant in built:
            variant.measure(warm_steps)
        for number in range(rounds):
            for variant in built:
                found = variant.measure(STEPS)
                if process.rank == 0:
                    print(json.dumps({"round": number} | found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
