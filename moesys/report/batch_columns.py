"""How figures of batch plans are called and written: in a terminal, on a page and beside a drawing. Pure."""

from collections.abc import Callable, Mapping
from typing import Any

from moesys.report.numbers import NONE, size


def seconds(value: float | None) -> str:
    """Four digits, in s, ms or us."""
    if value is None:
        return NONE
    unit, per_s = next(
        (one for one in (("s", 1.0), ("ms", 1e3)) if value * one[1] >= 1), ("us", 1e6)
    )
    return f"{value * per_s:#.4g} {unit}"


COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "step_s": ("step", seconds),
    "over_even": ("times even work", lambda value: f"{value:.2f}"),
    "idle_share": ("idle", lambda value: f"{value:.1%}"),
    "keys_share": ("wait for keys", lambda value: f"{value:.1%}"),
    "ring_bytes": ("around rings", size),
    "activation_bytes": ("of activations", size),
    "peak_tokens": ("tokens at most", lambda value: f"{value:,}"),
    "micro_steps": ("micro-steps", str),
    "planned_s": ("planned in", seconds),
}
"""By figure what it is called and how it is written."""
BESIDE = tuple(key for key in COLUMNS if key != "planned_s")
"""A panel."""


def cells(row: Mapping[str, Any]) -> list[str]:
    """Of a policy's figures, in the order of `COLUMNS`."""
    return [written(row[key]) for key, (_, written) in COLUMNS.items()]
