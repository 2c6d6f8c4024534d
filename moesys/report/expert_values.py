"""A number of each expert over time, in bounded memory.

Shapes: S bins of steps, L MoE layers, E experts of the layer with the most.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesys.report.binned import Binned

# One cell of a heat map is about 0.7 byte of PNG and 0.9 of base64: 1.5 MB of a page at most.
_CELLS = 1_600_000
_BINS = 320


@dataclass(frozen=True, kw_only=True)
class ExpertValues:
    """A number of each expert at some steps of a run; NaN past a layer's experts."""

    binned_SLE: NDArray[np.float64]
    """Averaged over the steps of a bin that were sampled."""
    final_LE: NDArray[np.float64]
    """At the last step that was."""
    first_step: int
    final_step: int
    stride: int
    """Every `stride`-th record was sampled."""


class ExpertBins:
    """Takes the steps one by one."""

    def __init__(self) -> None:
        self._binned: Binned | None = None
        self._steps = (0, 0)
        self._final_LE = np.zeros((0, 0))

    def add(self, step: int, value_LE: NDArray[np.float64]) -> None:
        """The values of one step."""
        if self._binned is None:
            bins = min(_BINS, max(8, _CELLS // value_LE.size))
            self._binned = Binned(value_LE.shape, bins // 2 * 2)
            self._steps = (step, step)
        self._binned.add(value_LE)
        self._final_LE = value_LE
        self._steps = (self._steps[0], step)

    def values(self, stride: int) -> ExpertValues | None:
        """Of every `stride`-th record; None before the first."""
        if self._binned is None:
            return None
        return ExpertValues(
            binned_SLE=self._binned.mean,
            final_LE=self._final_LE,
            first_step=self._steps[0],
            final_step=self._steps[1],
            stride=stride,
        )


def as_wide(value_LE: list[list[int]]) -> NDArray[np.float64]:
    """Of layers with different numbers of experts the shorter rows end in NaN."""
    widest = max(map(len, value_LE))
    return np.array([[*row, *[np.nan] * (widest - len(row))] for row in value_LE], dtype=np.float64)


def over_mean(load_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 = the layer's mean; 0 in a layer without a token."""
    mean_L1 = np.nanmean(load_LE, axis=1, keepdims=True)
    return np.divide(load_LE, mean_L1, out=0 * load_LE, where=mean_L1 > 0)
