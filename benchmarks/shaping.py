"""Uplinks of an emulated cluster at which exchanges of rows take a wanted share of a step.

By so much a step is longer than one whose rows stay where they are, while gradients still cross.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.fabric.layout import Layout

STAYING = "rows stay"
"""What no compression beats but by the work that it saves: no row travels, and each rank computes with its own."""
NEAR_PCT = 1.5
"""A share so near the wanted one is found."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    plain_ms: float
    staying_ms: float
    """With rows that stay."""

    @property
    def rows_ms(self) -> float:
        """That exchanges of rows take."""
        return self.plain_ms - self.staying_ms

    @property
    def share_pct(self) -> float:
        """Of a plain step."""
        return 100 * self.rows_ms / self.plain_ms


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """What the uplinks add to a plain step at a rate; it goes with one over the rate."""

    rate_bits: float
    rows_ms: float
    """Of exchanges of rows."""
    other_ms: float = 0.0
    """Of all else, as gradients."""


def rate_for(share_pct: float, free: StepTimes, crossing: Crossing) -> float:
    """Bits per second at which exchanges of rows take this share of a plain step. Pure.

    Raises:
        ValueError: they do so at none.
    """
    share = share_pct / 100
    rows_over_ms = (1 - share) * crossing.rows_ms - share * crossing.other_ms
    if rows_over_ms <= 0:
        raise ValueError(
            f"rows never take {share_pct} % of a step: all else adds {crossing.other_ms / crossing.rows_ms:.2f} times "
            "what they add; with more tokens in a step they take more"
        )
    wanted_ms = share * free.staying_ms - (1 - share) * free.rows_ms
    return crossing.rate_bits * rows_over_ms / max(wanted_ms, 0.01 * free.staying_ms)


def crossing_at(rate_bits: float, found: StepTimes, free: StepTimes) -> Crossing:
    """From steps at a rate and without a limit. Pure."""
    return Crossing(
        rate_bits=rate_bits,
        rows_ms=max(found.rows_ms - free.rows_ms, 1.0),
        other_ms=max(found.staying_ms - free.staying_ms, 0.0),
    )


def mean_of(known: Sequence[Crossing]) -> Crossing:
    """By what each says at one bit per second. Pure."""
    return Crossing(
        rate_bits=1.0,
        rows_ms=statistics.mean(one.rate_bits * one.rows_ms for one in known),
        other_ms=statistics.mean(one.rate_bits * one.other_ms for one in known),
    )


@dataclass(kw_only=True)
class Shaping:
    """Finds rates by trying: each try says what the uplinks add at one, and their mean says what to try next."""

    layout: Layout
    measure: Callable[[Layout], StepTimes]
    free: StepTimes
    """Without a limit."""
    guess: Crossing
    tries: int
    progress: Callable[[str], None]
    _known: list[Crossing] = field(default_factory=list)

    def to(self, share_pct: float) -> Layout:
        """With uplinks at which exchanges of rows take the share, as far as tries tell."""
        for _ in range(self.tries):
            layout = self._layout(share_pct, self._known or [self.guess])
            assert layout.inter_bits is not None
            found = self.measure(layout)
            self.progress(
                f"with uplinks of {layout.inter_bits / 1e6:.1f} Mbit/s rows take {found.share_pct:.1f} % of a step"
            )
            self._known.append(crossing_at(layout.inter_bits, found, self.free))
            if abs(found.share_pct - share_pct) <= NEAR_PCT:
                break
        # One try is no surer than the others.
        return self._layout(share_pct, self._known)

    def _layout(self, share_pct: float, known: Sequence[Crossing]) -> Layout:
        rate = rate_for(share_pct, self.free, mean_of(known))
        return replace(self.layout, inter_bits=math.ceil(rate))
