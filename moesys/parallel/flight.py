"""Which collectives of this rank are under way, by torch's flight recorder: FSDP's and the mesh's too.

There is one recorder for gloo and one for NCCL. It does not see point-to-point transfers over gloo.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch._C._distributed_c10d as c10d
import torch.distributed as dist

_ENTRIES = "128"
"""Kept per process. Reading them all takes a millisecond."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective call of this rank."""

    name: str
    """Backend and operation: gloo:all_to_all."""
    number: int
    """Counts the calls on its group; equal on all its ranks."""
    group: str
    ranks: int
    is_done: bool

    def __str__(self) -> str:
        return f"{self.name} #{self.number} of {self.group} ({self.ranks} ranks)"


@dataclass(frozen=True, kw_only=True)
class Flight:
    """What this rank has under way."""

    last: Collective | None
    """The oldest that is not done, else the newest."""
    done: tuple[tuple[str, str], ...]
    """How far each group came; as long as it does not change, nothing was completed."""

    @property
    def is_waiting(self) -> bool:
        return self.last is not None and not self.last.is_done


def record_flights() -> None:
    """Switch torch's recorder on; before the first group. The user's own setting stays."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _ENTRIES)


def flight(backend: str) -> Flight:
    """Now, on this rank; callable from any thread. The host does not wait for the device."""
    names = ["_dump_fr_trace_json"]
    if backend == "nccl":  # only in builds with it; saves talk over gloo beside it
        names.insert(0, "_dump_nccl_trace_json")
    sizes = _sizes()
    return join_flights([read_flight(json.loads(getattr(c10d, name)()), sizes) for name in names])


def read_flight(trace: dict[str, Any], sizes: dict[str, int]) -> Flight:
    """From a dump of the recorder. `sizes`: ranks of each group, by its name."""
    entries = sorted(trace.get("entries", []), key=lambda entry: entry["record_id"])
    pending = [entry for entry in entries if not entry["retired"]]
    chosen = pending[0] if pending else entries[-1] if entries else None
    done = sorted(
        (group, str(status["last_completed_collective"]))
        for group, status in trace.get("pg_status", {}).items()
    )
    # Point-to-point transfers have no part in the status.
    done += [("pending", str(entry["record_id"])) for entry in pending[:1]]
    return Flight(last=_collective(chosen, sizes) if chosen else None, done=tuple(done))


def join_flights(flights: Sequence[Flight]) -> Flight:
    """Of several recorders: what one of them waits for comes first, and what any of them completes is progress."""
    shown = sorted(flights, key=lambda flight: (not flight.is_waiting, flight.last is None))
    return Flight(
        last=shown[0].last, done=tuple(pair for flight in flights for pair in flight.done)
    )


def _collective(entry: dict[str, Any], sizes: dict[str, int]) -> Collective:
    name, described = entry["process_group"]
    return Collective(
        name=entry["profiling_name"],
        number=entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
        group=described if described not in ("", "undefined") else f"group {name}",
        ranks=sizes.get(name, 0),
        is_done=entry["retired"],
    )


def _sizes() -> dict[str, int]:
    world = dist.distributed_c10d._world
    return {name: len(world.pg_group_ranks[group]) for group, name in world.pg_names.items()}
