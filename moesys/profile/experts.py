"""Which grouped-linear backend is faster for given experts on this device.

Shapes: R rows, L local experts, F hidden, D model.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from moesys.ops import swiglu
from moesys.ops.grouped_linear import GroupedBackend, grouped_linear

BACKENDS: tuple[GroupedBackend, ...] = ("grouped_mm", "loop")


@dataclass(frozen=True, kw_only=True)
class BackendTimes:
    """Median forward + backward time of the experts by backend; None where the backend refuses the shape."""

    median_ms: dict[GroupedBackend, float | None]

    @property
    def fastest(self) -> GroupedBackend:
        return min(BACKENDS, key=lambda name: self.median_ms[name] or float("inf"))


def time_expert_backends(
    *,
    num_rows: int,
    num_experts: int,
    d_model: int,
    d_expert: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int = 3,
) -> BackendTimes:
    """Time both backends, interleaved, on random rows spread evenly over `num_experts` local experts."""
    counts_L = torch.full((num_experts,), num_rows // num_experts, dtype=torch.int64, device=device)
    counts_L[0] += num_rows - int(counts_L.sum())
    rows_RD = torch.randn(num_rows, d_model, device=device, dtype=dtype, requires_grad=True)
    gate_up = torch.randn(num_experts, 2 * d_expert, d_model, device=device, requires_grad=True)
    down = torch.randn(num_experts, d_model, d_expert, device=device, requires_grad=True)
    gradient_RD = torch.randn_like(rows_RD)

    def forward_backward(backend: GroupedBackend) -> float:
        _synchronize(device)
        start = time.perf_counter()
        hidden = swiglu(grouped_linear(rows_RD, gate_up, counts_L, backend))
        grouped_linear(hidden, down, counts_L, backend).backward(gradient_RD)
        _synchronize(device)
        rows_RD.grad = gate_up.grad = down.grad = None
        return (time.perf_counter() - start) * 1e3

    times_ms: dict[GroupedBackend, list[float]] = {name: [] for name in BACKENDS}
    refused: dict[GroupedBackend, RuntimeError] = {}
    for repeat in range(repeats + 1):
        for name in BACKENDS:
            try:
                elapsed_ms = forward_backward(name)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # grouped_mm wants rows of multiples of 16 bytes
                refused[name] = error
                continue
            if repeat:
                times_ms[name].append(elapsed_ms)
    if len(refused) == len(BACKENDS):
        raise RuntimeError(f"no backend computes these experts: {refused}")
    return BackendTimes(
        median_ms={name: statistics.median(ms) if ms else None for name, ms in times_ms.items()}
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
