"""Which of its candidates each MoE layer takes, from what was measured of all of them. Pure.

Shapes: M MoE layers, X candidates, of which the first is to leave rows as they are.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NEAR = 1.03
"""Times that differ by less are equal: clocks say no more."""
STEPS_PER_LAYER = 64
"""So many steps of bytes for each layer are told apart."""


class Trial(NamedTuple):
    """What one candidate does in one layer, over all ranks."""

    error: float
    """Of the layer's output, relative: root mean square of the difference over that of the output."""
    sent_bytes: int
    """Forward and backward, as if all that travels were rows."""
    ms: float
    """Of the slowest rank's forward."""


def within_error(trials_MX: Sequence[Sequence[Trial]], error_budget: float) -> list[int]:
    """Of each layer the fastest whose error is within the budget, of equally fast ones that with the least error."""
    return [_fastest(trials_X, error_budget) for trials_X in trials_MX]


def _fastest(trials_X: Sequence[Trial], error_budget: float) -> int:
    allowed = [x for x, trial in enumerate(trials_X) if x == 0 or trial.error <= error_budget]
    least_ms = min(trials_X[x].ms for x in allowed)
    near = [x for x in allowed if trials_X[x].ms <= NEAR * least_ms]
    return min(near, key=lambda x: (trials_X[x].error, trials_X[x].sent_bytes, x))


def within_bytes(trials_MX: Sequence[Sequence[Trial]], byte_budget: float) -> list[int]:
    """The choice with the least sum over layers of squared errors among those that send at most this share of the bytes that
    all layers send as they are; if there is none, the fewest bytes.

    A multiple-choice knapsack by dynamic programming over layers: what was taken so far, from fewer bytes to less error.
    """
    allowed_MX = [
        {x: trial for x, trial in enumerate(trials_X) if x == 0 or math.isfinite(trial.error)}
        for trials_X in trials_MX
    ]
    plain_bytes = sum(trials_X[0].sent_bytes for trials_X in trials_MX)
    most_bytes = byte_budget * plain_bytes
    step_bytes = most_bytes / (STEPS_PER_LAYER * max(1, len(trials_MX)))
    front = [_Taken(0, 0.0, ())]
    for left, allowed_X in enumerate(allowed_MX, 1):
        least_bytes = sum(min(t.sent_bytes for t in rest.values()) for rest in allowed_MX[left:])
        front = _front(
            (
                _Taken(
                    taken.sent_bytes + trial.sent_bytes,
                    taken.squared_error + trial.error**2,
                    (*taken.choice, x),
                )
                for taken in front
                for x, trial in allowed_X.items()
            ),
            most_bytes - least_bytes,
            step_bytes,
        )
    return list(front[-1].choice)


class _Taken(NamedTuple):
    """By the first layers."""

    sent_bytes: int
    squared_error: float
    choice: tuple[int, ...]


def _front(found: Iterable[_Taken], most_bytes: float, step_bytes: float) -> list[_Taken]:
    """Those with less error than all of fewer bytes, one for each step of bytes; if none is within `most_bytes`, the fewest."""
    ordered = sorted(found)
    front = ordered[:1]
    for taken in ordered[1:]:
        if taken.sent_bytes > most_bytes:
            break
        if taken.squared_error < front[-1].squared_error:
            if _step(taken, step_bytes) == _step(front[-1], step_bytes) and len(front) > 1:
                front.pop()
            front.append(taken)
    return front


def _step(taken: _Taken, step_bytes: float) -> int:
    return int(taken.sent_bytes // step_bytes) if step_bytes else 0
