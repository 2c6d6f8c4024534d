"""How fast a device and its host exchange bytes, each way."""

import statistics
import time

import torch
from torch import Tensor

from moesys.plan.offload import HostLink

LARGE_BYTES = 64 * 2**20
SMALL_BYTES = 1024
COPIES = 32
"""About as many as a block keeps storages."""


def host_link(device: torch.device, repeats: int = 5) -> HostLink:
    """Median rates of a large copy, and seconds of as many small ones as a block makes. Under 0.5 s."""
    there = torch.zeros(LARGE_BYTES, dtype=torch.uint8, device=device)
    at_home = torch.zeros(LARGE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def median_s(source: Tensor, target: Tensor, number: int) -> float:
        seconds = [_copies_s(source, target, number, device) for _ in range(repeats + 2)][2:]
        return statistics.median(seconds)

    small = slice(SMALL_BYTES)
    return HostLink(
        out_bytes_per_s=LARGE_BYTES / median_s(there, at_home, 1),
        back_bytes_per_s=LARGE_BYTES / median_s(at_home, there, 1),
        start_s=max(
            median_s(there[small], at_home[small], COPIES),
            median_s(at_home[small], there[small], COPIES),
        ),
    )


def _copies_s(source: Tensor, target: Tensor, number: int, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    for _ in range(number):
        target.copy_(source, non_blocking=True)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
