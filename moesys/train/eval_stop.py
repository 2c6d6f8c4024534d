"""An evaluation that a stop may end: it may take longer than the grace period."""

import time
from collections.abc import Callable

from moesys.train.grace import Pace, StopPlan, must_leave_evaluation

GIVEN_UP = StopPlan(
    evaluate=False,
    save=True,
    note="no evaluation: what is left of it and the save would end after train.grace_s; the next start makes it",
)


class EvalStop:
    """Of one evaluation, from its begin."""

    def __init__(self, grace_s: float, usual_s: float, pace: Callable[[float], Pace]) -> None:
        """`usual_s`: the last evaluation took, 0 = none. `pace`: collective, for so many seconds left to evaluate."""
        self._grace_s, self._usual_s, self._pace = grace_s, usual_s, pace
        self._began_s = time.perf_counter()
        self._is_asked = False

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._began_s

    def must_leave(self) -> bool:
        """Before each batch, the same on all ranks. Collective."""
        pace = self._pace(max(0.0, self._usual_s - self.elapsed_s))
        self._is_asked = pace.elapsed_s > 0
        return must_leave_evaluation(self._grace_s, pace)

    def plan(self, is_whole: bool) -> StopPlan | None:
        """What is left to do where a stop was asked for meanwhile; None = nobody has."""
        if not is_whole:
            return GIVEN_UP
        return StopPlan(evaluate=True, save=True) if self._is_asked else None
