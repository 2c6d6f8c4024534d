"""Steps of several variants of one training in one job, in turns: what speed.py runs as every rank of a fabric.

Each variant is a run of its own, built from a configuration as `moesys train` builds it; a round is a step of each. Rank 0
prints a line of JSON for every variant and round; the last step of a variant's last round is profiled, and not timed.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.variants import Variant, build_variants
from moesys.moe.codecs.clusters import ClusterCode
from moesys.parallel.bootstrap import process_group

CODEC = "codec"
CODEC_OPS = {
    CODEC,
    "moesys::cross_polytope",
    "moesys::member_means",
    "moesys::restore",
    "moesys::restore_backward",
    "moesys::pack",
    "moesys::unpack",
    "GeneratedBackwardFor_moesys_member_means_defaultBackward",
    "GeneratedBackwardFor_moesys_restore_defaultBackward",
}
"""With what is planned, encoded and decoded, all that a codec and the wire add to a step."""


class CodedVariant(Variant):
    """With what codecs do."""

    def measure(self) -> dict[str, Any]:
        """A step, in milliseconds and bytes."""
        result, step_ms = self.timed_step()
        rows, slots = sum(result.coded_rows_M), sum(map(sum, result.expert_load_ME))
        return {
            "variant": self.name,
            "step_ms": step_ms,
            "between_nodes_bytes": result.between_nodes_bytes,
            "rows": rows / slots if rows else 1.0,
        }

    def codec_ms(self) -> float:
        """Of one step, mean over ranks: hashing, ordering, means, restoring, few bits, forward and backward."""
        self._name_codecs()
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.step()
        own_us = sum(
            event.cpu_time_total for event in (profiled.events() or []) if _is_of_codec(event)
        )
        told = torch.tensor([own_us / 1e3], dtype=torch.float64)
        dist.all_reduce(told)
        return told.item() / dist.get_world_size()

    def _name_codecs(self) -> None:
        """What they do is an event of the profile."""
        for layer in self.run.model.moe_layers():
            codec: Any = layer.compression.codec
            if codec is not None:
                codec.plan = _named(codec.plan)
        ClusterCode.encode, ClusterCode.decode = (
            _named(ClusterCode.encode),
            _named(ClusterCode.decode),
        )


def _named(function: Any) -> Any:
    def named(*arguments: Any) -> Any:
        with record_function(CODEC):
            return function(*arguments)

    return named


def _is_of_codec(event: Any) -> bool:
    """And not within another that is."""
    if event.name not in CODEC_OPS:
        return False
    parent = event.cpu_parent
    while parent is not None:
        if parent.name in CODEC_OPS:
            return False
        parent = parent.cpu_parent
    return True


def main(variants: dict[str, list[str]], rounds: int) -> None:
    """A step of each comes first, and is not told."""
    with process_group("cpu", timeout_s=600.0) as process:
        built = build_variants(variants, process, CodedVariant)
        for variant in built:
            variant.measure()
        for number in range(rounds):
            for variant in built:
                found = variant.measure()
                if number == rounds - 1:
                    found["codec_ms"] = variant.codec_ms()
                if process.rank == 0:
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
