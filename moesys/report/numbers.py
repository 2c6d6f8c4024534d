"""Numbers and times as people read them. Missing or not finite is a dash."""

import math
from datetime import UTC, datetime
from typing import Any, TypeGuard

NONE = "-"


def number(value: Any, spec: str = ".4g") -> str:
    return format(value, spec) if is_number(value) else NONE


def item(values: Any, index: int, spec: str) -> str:
    """A number of a list; a dash where there is no list, or none so long."""
    return number(values[index] if isinstance(values, list) and index < len(values) else None, spec)


def short(value: Any) -> str:
    """Three digits and k, M, B or T."""
    if not is_number(value):
        return NONE
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def tick(value: float) -> str:
    """A label of an axis, at most about six characters."""
    if value == 0:
        return "0"
    if abs(value) >= 1e3:
        return short(value)
    if abs(value) >= 1e-2:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def size(value_bytes: Any) -> str:
    """Bytes with a binary unit."""
    if not is_number(value_bytes):
        return NONE
    value = float(value_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.4g} {unit}"
        value /= 1024
    raise AssertionError


def duration(seconds: Any) -> str:
    if not is_number(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02} h"


def moment(unix_s: Any) -> str:
    if not is_number(unix_s):
        return NONE
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
