"""Learning rate by step. Pure functions of the step and the configuration.

Each schedule warms up linearly from 0, so that step `warmup_steps` has the peak rate. Steps count from 1.
"""

import math

from moesys.config.schema import ScheduleConfig


def learning_rate(
    config: ScheduleConfig, *, peak_lr: float, step: int, total_steps: int, tokens: int, batch: int
) -> float:
    """The rate of optimizer step `step` (1..total_steps).

    `tokens` = tokens seen when the step is done, `batch` = sequences per step; only `power` reads them.
    """
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    if config.kind == "power":
        bound = batch * config.power_a * tokens**config.power_b
        return min(peak_lr, bound) * warmup * _linear_decay(config, step, total_steps)
    return peak_lr * (warmup if warmup < 1.0 else _shape(config, step, total_steps))


def _shape(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The multiple of the peak after warm-up."""
    if config.kind == "constant":
        return 1.0
    if config.kind == "cosine":
        span = max(1, total_steps - config.warmup_steps)
        return _cosine(1.0, config.min_lr_ratio, (step - config.warmup_steps) / span)
    if config.kind == "wsd":
        return _linear_decay(config, step, total_steps)
    return _infinite(config, step, total_steps)


def _linear_decay(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """1, then over the last decay_steps down to min_lr_ratio (WSD, 2404.06395; Power, 2408.13359)."""
    into_decay = step - (total_steps - config.decay_steps)
    if into_decay <= 0:
        return 1.0
    return 1.0 - (1.0 - config.min_lr_ratio) * into_decay / config.decay_steps


def _infinite(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Cosine to the plateau, plateau, exponential anneal (2503.02844; papers' eta_const, eta_min)."""
    plateau = config.constant_lr_ratio
    into_cooldown = step - config.warmup_steps
    if into_cooldown < config.cooldown_steps:
        return _cosine(1.0, plateau, into_cooldown / config.cooldown_steps)
    into_anneal = step - (total_steps - config.decay_steps)
    if into_anneal <= 0:
        return plateau
    return plateau * (config.min_lr_ratio / plateau) ** (into_anneal / config.decay_steps)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
