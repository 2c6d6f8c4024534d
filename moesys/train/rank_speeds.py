"""How fast the ranks' experts have been, the same to all of them.

Shapes: S steps, P ranks of an expert group.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from moesys.plan.placement import Amounts, Integers
from moesys.plan.speeds import SPEED_STEPS, relative_speeds, seconds_per_row
from moesys.train.timing import SectionTimer


class _Times(NamedTuple):
    """Of a step; of ranks at the same place in several groups together."""

    step: int
    us_P: list[int]
    rows_P: list[int]


class RankSpeeds:
    """Of one run, on every rank. Experts' forwards are timed, and a step's times travel with its other numbers."""

    def __init__(self, rank: int, num_ranks: int, device: torch.device, later: int) -> None:
        """`rank` is this one's place in its group. Asked for are speeds as of up to `later` steps ago."""
        self._rank, self._num_ranks = rank, num_ranks
        self._timer, self._rows = SectionTimer(device), 0
        self._history: deque[_Times] = deque(maxlen=SPEED_STEPS + later)

    @contextmanager
    def timed(self, num_rows: int) -> Iterator[None]:
        """Within, this rank's experts work on so many rows."""
        if not num_rows:
            yield
            return
        self._rows += num_rows
        with self._timer.section("experts"):
            yield

    def taken(self) -> tuple[int, int]:
        """Whole microseconds and rows since the last call. Waits for the device to have begun the last backward."""
        us, rows = round(sum(self._timer.read().values()) * 1e3), self._rows
        self._rows = 0
        return us, rows

    def numbers(self) -> list[float]:
        """Of a step [2 P], to be summed over ranks: whole, so exact in any order. Read once."""
        numbers_2P = np.zeros((2, self._num_ranks))
        numbers_2P[:, self._rank] = self.taken()
        return numbers_2P.ravel().tolist()

    def observe(self, step: int, numbers: Sequence[float]) -> None:
        """The sums of all ranks' numbers."""
        us_P, rows_P = np.array(numbers, dtype=np.int64).reshape(2, self._num_ranks).tolist()
        self._history.append(_Times(step, us_P, rows_P))

    def as_of(self, step: int) -> Amounts:
        """fp64 [P], 1 = mean (plan/speeds.py): as they were known before that step."""
        return relative_speeds(*self._known(step))

    def seconds_per_row(self, step: int) -> float | None:
        """Of a forward's products, on the mean rank, as it was known before that step."""
        return seconds_per_row(*self._known(step))

    def _known(self, step: int) -> tuple[Integers, Integers]:
        """[S, P] each: microseconds and rows before that step."""
        known = [times for times in self._history if times.step < step]
        us_SP = np.array([times.us_P for times in known], dtype=np.int64)
        rows_SP = np.array([times.rows_P for times in known], dtype=np.int64)
        shape = len(known), self._num_ranks
        return us_SP.reshape(shape), rows_SP.reshape(shape)

    @property
    def state(self) -> list[list[Any]]:
        """For a checkpoint."""
        return [list(times) for times in self._history]

    def at_resume(self, state: Sequence[Sequence[Any]]) -> None:
        """Go on with a checkpoint's, of as many ranks."""
        self._history.clear()
        self._history.extend(_Times(*times) for times in state)
