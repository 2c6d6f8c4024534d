"""What a sweep consists of. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SEED_KEY = "run.seed"
"""What differs only by this is one row of the table."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run."""

    row: str
    """What it is a measurement of: everything that was swept but the seed."""
    name: str
    """Of its folder; distinct."""
    overrides: tuple[str, ...]


def points_of(
    overrides: Sequence[str],
    variants: Mapping[str, Sequence[str]],
    combinations: Sequence[Sequence[str]],
) -> list[Point]:
    """Every variant with every combination; seeds outermost, so that what is compared runs close together in time.

    Raises ValueError if two of them would have one name.
    """
    found: list[Point] = []
    seeds = sorted({_seed(words) for words in combinations}, key=_natural)
    for seed in seeds:
        for variant, of_variant in (variants or {"": ()}).items():
            for words in combinations:
                if _seed(words) != seed:
                    continue
                swept = [word for word in words if not word.startswith(f"{SEED_KEY}=")]
                row = " ".join([variant, *swept] if variant else swept) or "all"
                name = f"{row} seed {seed}" if seed else row
                found.append(
                    Point(
                        row=row,
                        name=re.sub(r"[^\w.=-]+", "_", name),
                        overrides=(*overrides, *of_variant, *words),
                    )
                )
    names = [point.name for point in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two runs of the sweep would be called {', '.join(twice)}")
    return found


def _seed(words: Sequence[str]) -> str:
    return next((w.partition("=")[2] for w in words if w.startswith(f"{SEED_KEY}=")), "")


def _natural(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (-1, text)
