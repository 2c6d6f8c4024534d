"""The tokens of each expert in the next step, from those of the steps before, and how far off that was. Pure.

Shapes: W steps from the oldest to the newest, M MoE layers, E experts.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from moesys.config.placement_schema import Predictor

PREDICTORS: tuple[Predictor, ...] = get_args(Predictor)
WINDOW_STEPS = 5
"""Hecate's (2502.02581, section 4.1)."""
DECAY = 0.5
"""Of an exponential mean: what a step weighs less than the next."""

Loads = NDArray[np.float64]


class _Predict(Protocol):
    def __call__(self, history_WME: Loads, window: int) -> Loads: ...


def predicted_loads(
    history_WME: NDArray[np.integer] | Loads, predictor: Predictor, window: int = WINDOW_STEPS
) -> Loads:
    """fp64 [M, E], never negative; each layer's sum is that of its last step.

    mean: of the last `window` steps. exponential: of all, a step weighs half of the next. last: the last step's. slope: the
    mean and, in proportion to what it would have gained in the steps before, what a straight line through the last `window`
    adds to it.

    Raises:
        ValueError: there is no step to predict from.
    """
    history_WME = np.asarray(history_WME, dtype=np.float64)
    if len(history_WME) == 0:
        raise ValueError("loads are predicted from those of at least 1 step, there is none")
    predicted_ME = np.maximum(_PREDICT[predictor](history_WME, window), 0.0)
    last_M1 = history_WME[-1].sum(1, keepdims=True)
    total_M1 = predicted_ME.sum(1, keepdims=True)
    return predicted_ME * np.divide(
        last_M1, total_M1, out=np.ones_like(total_M1), where=total_M1 > 0
    )


def prediction_errors(predicted_ME: Loads, true_ME: NDArray[np.integer] | Loads) -> Loads:
    """fp64 [M]: the share of each layer's tokens that went to other experts than predicted, 0 to 1.

    The total variation distance of the two distributions. 0 where a layer has no token in one of them.
    """
    apart_M = np.abs(_shares(predicted_ME) - _shares(true_ME)).sum(1) / 2
    return np.nan_to_num(apart_M)


def steps_needed(predictor: Predictor, window: int = WINDOW_STEPS) -> int:
    """So many last steps decide."""
    return {"mean": window, "exponential": 32, "last": 1, "slope": 2 * window}[predictor]


def _shares(loads_ME: NDArray[np.integer] | Loads) -> Loads:
    """Of each layer's tokens; NaN where it has none."""
    loads_ME = np.asarray(loads_ME, dtype=np.float64)
    total_M1 = loads_ME.sum(1, keepdims=True)
    return np.divide(loads_ME, total_M1, out=np.full_like(loads_ME, np.nan), where=total_M1 > 0)


def _mean(history_WME: Loads, window: int) -> Loads:
    return history_WME[-window:].mean(0)


def _exponential(history_WME: Loads, window: int) -> Loads:
    weights_W = DECAY ** np.arange(len(history_WME) - 1, -1, -1, dtype=np.float64)
    return np.einsum("w,wme->me", weights_W / weights_W.sum(), history_WME)


def _last(history_WME: Loads, window: int) -> Loads:
    return history_WME[-1]


def _slope(history_WME: Loads, window: int) -> Loads:
    steps = len(history_WME)
    tried = range(max(2, steps - window), steps)
    gained = squared = 0.0
    for step in tried:
        rise_ME = _rise(history_WME[:step], window)
        gained += float((rise_ME * (history_WME[step] - _mean(history_WME[:step], window))).sum())
        squared += float(np.square(rise_ME).sum())
    trust = min(1.0, max(0.0, gained / squared)) if squared else 0.0
    return _mean(history_WME, window) + trust * _rise(history_WME, window)


def _rise(history_WME: Loads, window: int) -> Loads:
    """What the least-squares line through the last steps says of the next, over their mean."""
    last_WME = history_WME[-window:]
    number = len(last_WME)
    times_W = np.arange(number) - (number - 1) / 2
    spread = np.square(times_W).sum()
    if not spread:
        return np.zeros_like(last_WME[0])
    return np.einsum("w,wme->me", times_W / spread, last_WME) * ((number + 1) / 2)


_PREDICT: Mapping[Predictor, _Predict] = MappingProxyType(
    {"mean": _mean, "exponential": _exponential, "last": _last, "slope": _slope}
)
