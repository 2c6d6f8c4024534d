"""Which of many equal things is slow: a comparison with the median, which the slow ones do not move. Pure."""

import statistics
from collections.abc import Mapping, Sequence

DEVIATIONS = 5.0
MAD_TO_SIGMA = 1.4826
"""Of a normal distribution; the median absolute deviation times this is its standard deviation."""


def slow_ones(seconds: Sequence[float], factor: float) -> list[int]:
    """The indices of those that take more than `factor` (> 1) times the lower median, and lie beyond the scatter.

    Beyond the scatter: more than DEVIATIONS standard deviations from it, as estimated from the median absolute
    deviation. Never more than half of them; of two, the slower one.
    """
    if not seconds:
        return []
    usual = statistics.median_low(seconds)
    scatter = MAD_TO_SIGMA * statistics.median_low([abs(s - usual) for s in seconds])
    limit = max(factor * usual, usual + DEVIATIONS * scatter)
    return [index for index, s in enumerate(seconds) if s > limit]


def slow_every_time(tries: Sequence[Sequence[float]], factor: float) -> list[int]:
    """`tries[t][i]`: seconds of member i. Those that are slow in each try; none without tries."""
    if not tries:
        return []
    found = [set(slow_ones(seconds, factor)) for seconds in tries]
    return sorted(set.intersection(*found))


def ratings(pairs: Mapping[tuple[int, int], float], members: int) -> list[float | None]:
    """Each member's best rate over its pairs; None without any.

    A link is as slow as the slower of its ends, so a member's own rate shows in its best link.
    """
    best: list[float | None] = [None] * members
    for pair, rate in pairs.items():
        for member in pair:
            known = best[member]
            best[member] = rate if known is None else max(known, rate)
    return best


def slow_pairs(pairs: Mapping[tuple[int, int], float], factor: float) -> list[tuple[int, int]]:
    """Links slower by `factor` than what the slower of their ends reaches elsewhere."""
    members = 1 + max((max(pair) for pair in pairs), default=-1)
    best = [rating or 0.0 for rating in ratings(pairs, members)]
    return sorted((i, j) for (i, j), rate in pairs.items() if rate * factor < min(best[i], best[j]))
