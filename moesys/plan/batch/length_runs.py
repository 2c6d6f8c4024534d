"""Sequences in order of length, the longest first, cut into runs. Pure.

Shapes: N sequences, P places at which a run may end.
"""

import numpy as np

from moesys.plan.placement import Integers

MOST_PLACES = 512
"""Buckets of more sequences end at so many even places alone: the best bounds are looked for in P^2 steps."""


def token_runs(lengths_N: Integers, most_runs: int) -> list[slice]:
    """At most so many, such that the one with the most tokens has as few as can be."""
    ends_N = np.cumsum(lengths_N)
    least, most = int(lengths_N.max(initial=0)), int(lengths_N.sum())
    while least < most:
        middle = (least + most) // 2
        if len(_of_most_tokens(ends_N, middle)) <= most_runs:
            most = middle
        else:
            least = middle + 1
    return _of_most_tokens(ends_N, least)


def _of_most_tokens(ends_N: Integers, most_tokens: int) -> list[slice]:
    """Each as long as it may be; no sequence is longer than that."""
    runs: list[slice] = []
    first = before = 0
    while first < len(ends_N):
        end = int(np.searchsorted(ends_N, before + most_tokens, side="right"))
        runs.append(slice(first, end))
        first, before = end, int(ends_N[end - 1])
    return runs


def length_buckets(lengths_N: Integers, most_buckets: int) -> list[slice]:
    """So many runs, or one for each place, such that sequences are the fewest tokens shorter than the longest of their run.

    By dynamic programming over the last run (the bucketing of FlexSP, 2412.01523).
    """
    number = len(lengths_N)
    at_P = np.unique(np.linspace(0, number, min(number, MOST_PLACES) + 1).astype(np.int64))
    before_P = np.concatenate([[0], np.cumsum(lengths_N)])[at_P]
    # A run from the first of two places to the second; the last place begins none.
    first_P = np.append(lengths_N, 0)[at_P]
    short_PP = first_P[:, None] * (at_P - at_P[:, None]) - (before_P - before_P[:, None])
    short_PP = np.where(at_P > at_P[:, None], short_PP.astype(np.float64), np.inf)
    least_P = np.where(at_P == 0, 0.0, np.inf)
    firsts: list[Integers] = []
    for _ in range(min(most_buckets, len(at_P) - 1)):
        sums_PP = least_P[:, None] + short_PP
        firsts.append(sums_PP.argmin(0))
        least_P = sums_PP.min(0)
    runs: list[slice] = []
    place = len(at_P) - 1
    for first_of_P in reversed(firsts):
        runs.append(slice(int(at_P[first_of_P[place]]), int(at_P[place])))
        place = int(first_of_P[place])
    return runs[::-1]
