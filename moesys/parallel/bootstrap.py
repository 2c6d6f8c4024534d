"""Start and end of a process's part in a run: the only process-wide state.

Rank and world size come from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK); without it the
process is a world of one.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process's place in the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str


def world_size_from_env() -> int:
    """The world size that torchrun announced, or 1; needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node_from_env() -> int | None:
    """How many ranks torchrun started on this node; None if it did not say."""
    text = os.environ.get("LOCAL_WORLD_SIZE")
    return int(text) if text else None


@contextmanager
def process_group(device: str, timeout_s: float) -> Iterator[Process]:
    """Join the run (NCCL on GPUs, gloo on CPUs), leave it at the end. `device`: auto, cpu or cuda."""
    rank = int(os.environ.get("RANK", "0"))
    world_size = world_size_from_env()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(
                f"local rank {local_rank} has no GPU: this node shows {count}; start at most {count} "
                "ranks per node, or set train.device=cpu"
            )
        torch.cuda.set_device(local_rank)
    backend = "nccl" if use_cuda else "gloo"
    own_device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    store = dist.HashStore() if world_size == 1 else None
    dist.init_process_group(
        backend,
        store=store,
        init_method=None if store is not None else "env://",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=own_device if use_cuda else None,
    )
    try:
        yield Process(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            device=own_device,
            backend=backend,
        )
        # A rank that leaves while another still talks to it can bring both down.
        dist.barrier()
    finally:
        gc.collect()  # groups that only cycles still hold must not outlive the interpreter
        dist.destroy_process_group()
