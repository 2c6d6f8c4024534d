"""Times that survive a noisy machine: contestants take turns, and only turns of one round are compared."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

MIN_ROUNDS = 3
HOPELESS = 4.0
"""Who took this many times as long as the fastest each time, warm-up included, runs no more: it decides nothing."""


def time_interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    budget_s: float,
    warmup_rounds: int = 1,
    between: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of each contestant's runs, one per round, oldest first.

    Every round runs each contestant once, starting one further than the round before. After the warm-up,
    rounds go on until `budget_s` seconds are spent, at least MIN_ROUNDS; whoever is HOPELESS runs only the
    first. `between` runs, untimed, after each run.
    """
    names = list(contestants)
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    least_ms = dict.fromkeys(names, float("inf"))
    deadline_s = 0.0
    for round_ in range(10_000):
        if round_ == warmup_rounds:
            deadline_s = time.monotonic() + budget_s
        timed = round_ - warmup_rounds
        if timed >= MIN_ROUNDS and time.monotonic() > deadline_s:
            break
        if timed >= 1:
            best_ms = min(least_ms.values())
            names = [name for name in names if least_ms[name] <= HOPELESS * best_ms]
        for turn in range(len(names)):
            name = names[(round_ + turn) % len(names)]
            synchronize(device)
            start = time.perf_counter()
            contestants[name]()
            synchronize(device)
            elapsed_ms = (time.perf_counter() - start) * 1e3
            between()
            least_ms[name] = min(least_ms[name], elapsed_ms)
            if timed >= 0:
                times_ms[name].append(elapsed_ms)
    return times_ms


def paired_ratio(peer_ms: Sequence[float], our_ms: Sequence[float]) -> float:
    """Median over the rounds both ran of peer / ours: above 1 = ours is faster. Drift between rounds cancels."""
    return statistics.median(p / o for p, o in zip(peer_ms, our_ms, strict=False))


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute truth; infinite if shapes differ or any is NaN."""
    if value.shape != truth.shape:
        return float("inf")
    difference = (value.double() - truth.double()).abs().max().item()
    error = difference / max(truth.double().abs().max().item(), 1e-30)
    return error if error == error else float("inf")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
