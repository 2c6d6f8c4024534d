"""A bounded picture of an unbounded series."""

import numpy as np
from numpy.typing import NDArray


class Binned:
    """Rows of one shape, averaged into at most `capacity` bins of consecutive rows.

    While rows fit, each has a bin of its own and nothing is lost. When the bins are full, neighbours
    are merged in pairs and every bin covers twice as many rows, so memory does not grow with the rows.
    NaN = no value: it is left out of the means, and a bin of nothing else is NaN.

    Args:
        shape: of one row.
        capacity: an even number of bins; from half of it up to all of it are in use once it overflowed.
    """

    def __init__(self, shape: tuple[int, ...], capacity: int) -> None:
        assert capacity >= 2, capacity
        assert capacity % 2 == 0, capacity
        self._capacity = capacity
        self._sums = np.zeros((capacity, *shape))
        self._counts = np.zeros((capacity, *shape), dtype=np.int64)
        self._lows = np.full((capacity, *shape), np.inf)
        self._highs = np.full((capacity, *shape), -np.inf)
        self._bin = 0
        self._rows_in_bin = 0
        self.rows_per_bin = 1

    def add(self, row: NDArray[np.float64]) -> None:
        """Add one row (float64, of the shape given)."""
        if self._bin == self._capacity:
            self._merge_pairs()
        i = self._bin
        known = np.isfinite(row)
        self._sums[i] += np.where(known, row, 0.0)
        self._counts[i] += known
        self._lows[i] = np.minimum(self._lows[i], np.where(known, row, np.inf))
        self._highs[i] = np.maximum(self._highs[i], np.where(known, row, -np.inf))
        self._rows_in_bin += 1
        if self._rows_in_bin == self.rows_per_bin:
            self._bin += 1
            self._rows_in_bin = 0

    def __len__(self) -> int:
        """Bins in use, the last one perhaps not full."""
        return self._bin + (self._rows_in_bin > 0)

    @property
    def mean(self) -> NDArray[np.float64]:
        """float64 [bins, *shape]."""
        n = len(self)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self._counts[:n] > 0, self._sums[:n] / self._counts[:n], np.nan)

    @property
    def low(self) -> NDArray[np.float64]:
        """float64 [bins, *shape], the smallest value of each bin."""
        n = len(self)
        return np.where(self._counts[:n] > 0, self._lows[:n], np.nan)

    @property
    def high(self) -> NDArray[np.float64]:
        """float64 [bins, *shape], the largest value of each bin."""
        n = len(self)
        return np.where(self._counts[:n] > 0, self._highs[:n], np.nan)

    def _merge_pairs(self) -> None:
        half = self._capacity // 2
        for array, pair, empty in (
            (self._sums, np.add, 0),
            (self._counts, np.add, 0),
            (self._lows, np.minimum, np.inf),
            (self._highs, np.maximum, -np.inf),
        ):
            array[:half] = pair(array[0::2], array[1::2])
            array[half:] = empty
        self._bin = half
        self.rows_per_bin *= 2
