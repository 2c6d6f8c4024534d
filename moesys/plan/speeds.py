"""How fast ranks are, from how long their experts took for how many rows. Pure.

Shapes: S steps, P ranks of an expert group, K of them of which enough is known.
"""

import numpy as np

from moesys.plan.placement import Amounts, Integers

SPEED_STEPS = 5
"""So many of the last count, each rank's by its median: one slow moment changes nothing."""
LEAST_STEPS = 3
"""In so many of them a rank must have had rows."""
BAND = 0.05
"""A speed so near the mean is the mean: noise moves no rows."""
SLOWEST, FASTEST = 0.25, 4.0


def seconds_per_row(us_SP: Integers, rows_SP: Integers) -> float | None:
    """Of the mean rank, in the fastest of the last steps, for a first one compiles; None where none is known."""
    us_S, rows_S = us_SP[-SPEED_STEPS:].sum(1), rows_SP[-SPEED_STEPS:].sum(1)
    is_told_S = (us_S > 0) & (rows_S > 0)
    return float((us_S[is_told_S] / rows_S[is_told_S]).min()) / 1e6 if is_told_S.any() else None


def relative_speeds(us_SP: Integers, rows_SP: Integers) -> Amounts:
    """fp64 [P]: each rank's rows per second over the mean rank's, in whole hundredths from SLOWEST to FASTEST; 1 of a rank of which
    too little is known.

    Where time is not in proportion to rows, since each product costs something beside them, these are not the ranks' true
    speeds, but shares by them still go to where all ranks take as long: a rank's next share is what it had over the time that
    it took for it, which is the same again once times are equal.

    Args:
        us_SP: whole microseconds of the last steps.
        rows_SP: that they were taken for.
    """
    us_SP, rows_SP = us_SP[-SPEED_STEPS:], rows_SP[-SPEED_STEPS:]
    is_told_SP = (us_SP > 0) & (rows_SP > 0)
    is_known_P = is_told_SP.sum(0) >= LEAST_STEPS
    speeds_P = np.ones(us_SP.shape[1])
    if not is_known_P.any():
        return speeds_P
    rate_SP = np.where(is_told_SP, rows_SP / np.maximum(us_SP, 1), np.nan)
    rate_K = np.nanmedian(rate_SP[:, is_known_P], axis=0)
    speed_K = rate_K / rate_K.mean()
    bounded_K = np.clip(np.round(speed_K, 2), SLOWEST, FASTEST)
    speeds_P[is_known_P] = np.where(np.abs(speed_K - 1) <= BAND, 1.0, bounded_K)
    return speeds_P
