"""Micro-batches whose activations a rank holds at once, by pipeline schedule. Pure.

What a forward keeps is held until its backward, where that is split until the weights' half. Letters: p ranks, r this
rank's place, v stages per rank, n micro-batches.
"""

from collections import Counter

from moesys.plan.pipeline import rounds_of


def micro_batches_in_flight(schedule: str, r: int, p: int, v: int, n: int) -> tuple[int, ...]:
    """Of each of the rank's stages, first to last, when it holds most.

    tests/plan/test_in_flight.py compares it with what torch's schedules do. gpipe and 1f1b: 2104.04473; interleaved and
    interleaved_zero_bubble: the rank's warm-up and one more; zbv: 2401.10241; dualpipev: github.com/deepseek-ai/DualPipe.
    """
    match schedule:
        case "gpipe":
            return (n,)
        case "1f1b":
            return (min(n, p - r),)
        case "zbv":
            last = min(n, r + 1)
            return (min(n, 2 * p - last), last)
        case "dualpipev":
            return (2 * p - r, r + 1)
        case "interleaved" | "interleaved_zero_bubble":
            # A rank takes so many micro-batches through a stage before it turns to its next.
            turn = n // rounds_of(p, n)
            ahead = 2 * (p - 1 - r) + 1 if schedule == "interleaved" else p
            forwards = min(v * n, (v - 1) * turn + ahead)
            counts = Counter(i // turn % v for i in range(forwards))
            return tuple(counts[stage] for stage in range(v))
        case _:
            raise ValueError(f"{schedule!r} is no pipeline schedule")
