"""Pieces that lie on lines, one after the other. Pure.

Shapes: X pieces, those of a line next to each other.
"""

import numpy as np
from numpy.typing import NDArray


def begins(lengths_X: NDArray, lines_X: NDArray[np.int64]) -> NDArray:
    """Where each piece begins on its line, of the lengths' dtype; lines are numbered from 0 and ascend."""
    before_X = lengths_X.cumsum() - lengths_X
    first_X = np.flatnonzero(np.diff(lines_X, prepend=-1))
    return before_X - np.repeat(before_X[first_X], np.diff(first_X, append=len(lines_X)))
