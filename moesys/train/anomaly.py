"""Steps that would do harm: found by their loss and gradient norm, and answered. Pure: no ranks, clock, device or files.

A number that is not finite is always an anomaly. A spike is a loss or norm more than `sigma` deviations above the
centre of the last good steps' (the 6-sigma rule), both of logarithms, so that it is a ratio which counts. What is
done about it is Ling's recipe (2503.05139, sec. 3.4.4: skip the update, train on the batch later, lower the rate),
then a roll back, then a stop. An answer has `tries`; when they are used up the next one on the ladder follows. After
`calm_steps` good steps in a row the ladder starts anew, so anomalies without such a calm end the run in bounded time.

Shapes: B windows of N steps.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesys.config.schema import AnomalyConfig

Answer = Literal["skip", "reinject", "lower_rate", "roll_back", "stop"]

LADDERS: dict[str, tuple[Answer, ...]] = {
    "stop": ("stop",),
    "roll_back": ("roll_back", "stop"),
    "lower_rate": ("lower_rate", "roll_back", "stop"),
    "skip": ("skip", "lower_rate", "roll_back", "stop"),
    "reinject": ("reinject", "lower_rate", "roll_back", "stop"),
}
"""The answers of each anomaly.policy, in the order in which they are tried."""
LEAST_DEVIATION = 0.005
"""Of logarithms: a curve without noise is not judged by its last digits. At 6 sigma a rise of 3 % is none."""
MOST_WAITING = 64
"""Batches that wait to be trained on again; beyond that one is dropped."""
_SMALLEST = 1e-30
_NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_WINSOR = 3.0


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A batch that was not trained on. If the batch size changes before it is due, the one that begins where it did."""

    first_sample: int
    """Its first position in the order of samples."""
    due_step: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong with a step."""

    reason: Literal[
        "loss is not finite", "grad_norm is not finite", "loss spikes", "grad_norm spikes"
    ]
    limit: float | None = None
    """That the number is above; None if it is not finite."""


@dataclass(frozen=True, kw_only=True)
class AnomalyState:
    """What is remembered from step to step; `to_json` goes into checkpoints."""

    log_losses: tuple[float, ...] = ()
    """Natural logarithms over the last good steps, oldest first."""
    log_norms: tuple[float, ...] = ()
    num_found: int = 0
    """Anomalies since the run began. A roll back does not undo them."""
    num_calm_steps: int = 0
    """Good steps since the last one."""
    tries: Mapping[str, int] = field(default_factory=dict)
    """How often each answer was given since the last calm."""
    low_rate_steps: int = 0
    """So many further steps run at the lower rate."""
    waiting: tuple[Waiting, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes the same state to the last bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "AnomalyState":
        return cls(
            log_losses=tuple(state["log_losses"]),
            log_norms=tuple(state["log_norms"]),
            num_found=state["num_found"],
            num_calm_steps=state["num_calm_steps"],
            tries=dict(state["tries"]),
            low_rate_steps=state["low_rate_steps"],
            waiting=tuple(Waiting(**batch) for batch in state["waiting"]),
        )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a step."""

    state: AnomalyState
    """After the step."""
    rate: float | None
    """The schedule's learning rate is multiplied by this; None = no update, the gradients are dropped."""
    finding: Finding | None = None
    answer: Answer | None = None
    """To the finding; None if there is none."""


def decide(
    config: AnomalyConfig,
    state: AnomalyState,
    *,
    step: int,
    loss: float,
    grad_norm: float,
    first_sample: int,
    can_roll_back: bool,
) -> Decision:
    """Judge a step by its loss (nats per token) and gradient norm, both over all ranks.

    `first_sample` is the batch's first position in the order of samples; one that waits in `state` is thereby taken.
    Without a checkpoint (`can_roll_back`) that rung is left out.
    """
    again = any(batch.first_sample == first_sample for batch in state.waiting)
    state = replace(
        state, waiting=tuple(b for b in state.waiting if b.first_sample != first_sample)
    )
    finding = find(config, state, loss=loss, grad_norm=grad_norm)
    if finding is None:
        return _applied(config, state, loss=loss, grad_norm=grad_norm)
    answer = _next_answer(config, state, can_roll_back)
    tries = {**state.tries, answer: state.tries.get(answer, 0) + 1}
    state = replace(state, num_found=state.num_found + 1, num_calm_steps=0, tries=tries)
    rate = None
    if answer == "reinject":
        if again or len(state.waiting) == MOST_WAITING:
            answer = "skip"  # once is enough
        else:
            due_step = step + config.reinject_after_steps
            batch = Waiting(first_sample=first_sample, due_step=due_step)
            state = replace(state, waiting=(*state.waiting, batch))
    elif answer == "lower_rate":
        is_applied = finding.limit is not None
        rate = config.rate_factor if is_applied else None
        state = replace(state, low_rate_steps=config.rate_steps - is_applied)
    return Decision(state=state, rate=rate, finding=finding, answer=answer)


def find(
    config: AnomalyConfig, state: AnomalyState, *, loss: float, grad_norm: float
) -> Finding | None:
    """The first thing that is wrong with these numbers, given the good steps before."""
    if not math.isfinite(loss):
        return Finding(reason="loss is not finite")
    if not math.isfinite(grad_norm):
        return Finding(reason="grad_norm is not finite")
    if not config.sigma or len(state.log_losses) < config.warmup_steps:
        return None
    limit = float(spike_limit(state.log_losses, config.sigma))
    if loss > limit:
        return Finding(reason="loss spikes", limit=limit)
    limit = float(spike_limit(state.log_norms, config.sigma))
    if grad_norm > limit:
        return Finding(reason="grad_norm spikes", limit=limit)
    return None


def spike_limit(logs_BN: ArrayLike, sigma: float) -> NDArray[np.float64]:
    """The value `sigma` deviations above the centre of N others, given as natural logarithms; float64 [B].

    Mean and standard deviation of what is left when values further than 3 robust deviations (median and median
    absolute deviation) from the median are moved there: nearly as exact as without, and no outlier moves them far.
    """
    logs_BN = np.asarray(logs_BN, dtype=np.float64)
    median_B1 = np.median(logs_BN, axis=-1, keepdims=True)
    spread_B1 = np.median(np.abs(logs_BN - median_B1), axis=-1, keepdims=True)
    reach_B1 = _WINSOR * _NORMAL_MAD * spread_B1
    logs_BN = logs_BN.clip(median_B1 - reach_B1, median_B1 + reach_B1)
    deviation_B = np.maximum(logs_BN.std(axis=-1), LEAST_DEVIATION)
    return np.exp(np.minimum(logs_BN.mean(axis=-1) + sigma * deviation_B, 700.0))


def due(state: AnomalyState, step: int) -> int | None:
    """The first sample of the batch to train on again in this step; None = a new batch."""
    return next((batch.first_sample for batch in state.waiting if batch.due_step <= step), None)


def _applied(
    config: AnomalyConfig, state: AnomalyState, *, loss: float, grad_norm: float
) -> Decision:
    num_calm_steps = state.num_calm_steps + 1
    rate = config.rate_factor if state.low_rate_steps else 1.0
    state = replace(
        state,
        num_calm_steps=num_calm_steps,
        tries={} if num_calm_steps >= config.calm_steps else state.tries,
        low_rate_steps=max(0, state.low_rate_steps - 1),
    )
    if config.sigma:
        state = replace(
            state,
            log_losses=_appended(state.log_losses, loss, config.window_steps),
            log_norms=_appended(state.log_norms, grad_norm, config.window_steps),
        )
    return Decision(state=state, rate=rate)


def _next_answer(config: AnomalyConfig, state: AnomalyState, can_roll_back: bool) -> Answer:
    for answer in LADDERS[config.policy]:
        is_possible = can_roll_back or answer != "roll_back"
        if is_possible and state.tries.get(answer, 0) < config.tries:
            return answer
    return "stop"


def _appended(logarithms: tuple[float, ...], value: float, limit: int) -> tuple[float, ...]:
    return (*logarithms, math.log(max(value, _SMALLEST)))[-limit:]
