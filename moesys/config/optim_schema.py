"""The sections `optim` and `schedule` of schema.py. Standard library only."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW."""

    lr: float
    """Peak learning rate; the schedule multiplies it."""
    beta1: float = 0.9
    """Decay of the mean gradient, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the mean squared gradient, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the mean squared gradient."""
    weight_decay: float = 0.1
    """Not applied to norms, biases and routers' selection bias."""
    clip_grad_norm: float = 1.0
    """One norm over dense and expert parameters; 0 = no clipping (the norm is still measured)."""
    frozen_experts: int | None = None
    """n = all but the routed experts from the n-th on and their rows of the router stays as it is, and nothing decays:
    a part that is trained apart (FlexOlmo, 2507.07024). null = everything is trained."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over optimizer steps, as a multiple of optim.lr. Phases must fit in train.steps."""

    kind: Literal["cosine", "wsd", "constant", "power", "infinite"] = "cosine"
    """The shape after warm-up; the other keys say which shapes read them."""
    warmup_steps: int = 0
    """Linear from 0 to the peak."""
    min_lr_ratio: float = 0.1
    """cosine: the floor at the last step; wsd, power and infinite: the end of the decay."""
    decay_steps: int = 0
    """wsd, power, infinite: length of the final decay (infinite: the exponential anneal)."""
    power_a: float = 4.0
    """power: lr = min(optim.lr, batch * a * n^b), n = tokens seen, batch = sequences per step (2408.13359)."""
    power_b: float = -0.51
    """power: the exponent b, below 0."""
    cooldown_steps: int = 0
    """infinite: cosine from the peak to constant_lr_ratio (2503.02844)."""
    constant_lr_ratio: float = 0.5
    """infinite: the plateau between cool-down and anneal."""
