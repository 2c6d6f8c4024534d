"""Charts as inline SVG that takes its colours and type from the page's CSS.

Written by hand rather than drawn by a plotting library: the text stays text, dark mode and phones
restyle it, and a chart is a few kilobytes. Every chart also carries its numbers as JSON, which the
page's cursor reads (and so can anybody else).
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from moesys.report.numbers import number, tick

Array = NDArray[np.float64]

_WIDTH, _HEIGHT = 640.0, 266.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 66.0, 612.0, 12.0, 232.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve. `colour` is 1..8: the page's colour-blind-safe order, then its ink."""

    name: str
    x: Array
    y: Array
    colour: int
    style: Literal["line", "faint", "dots", "dashed"] = "line"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A vertical line at a step: the run was resumed or stopped there."""

    x: float
    kind: Literal["resumed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What a figure of the page needs: `svg`, the legend's (name, colour, style) and the numbers as JSON."""

    title: str
    unit: str
    svg: Markup
    legend: list[tuple[str, int, str]]
    data: Markup
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where a value lies in the drawing."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool = False
    whole: bool = False
    """Values are counts, so a label between two of them would say nothing."""
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.log_y:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        return _BOTTOM - (value - low) / (high - low) * (_BOTTOM - _TOP)


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    log_y: bool = False,
    note: str = "",
) -> Chart | None:
    """Curves over steps, or None where no series has a value.

    Args:
        from_zero: the axis begins at 0.
        log_y: logarithmic where the values are positive and span more than a factor of 30.
    """
    shown = [one for one in series if np.isfinite(one.y).any()]
    if not shown:
        return None
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in shown])
    log_y = log_y and values.min() > 0 and values.max() / values.min() > 30
    y_range = _log_range(values) if log_y else _linear_range(values, from_zero=from_zero)
    frame = _Frame(
        x_range=_x_range([one.x for one in shown]),
        y_range=y_range,
        log_y=log_y,
        whole=bool((values == np.rint(values)).all()),
    )
    _axes(frame)
    _marks(frame, marks)
    for one in shown:
        _curve(frame, one)
    summary = "; ".join(f"{one.name} {_extent(one.y)}" for one in shown)
    return Chart(
        title=title,
        unit=unit,
        svg=_svg(frame, f"{title}, {unit}, over steps. {summary}."),
        legend=[(one.name, one.colour, one.style) for one in shown],
        data=_data(frame, [(one.name, one.x, one.y) for one in shown]),
        note=note,
    )


def stacked_chart(
    title: str,
    unit: str,
    x: Array,
    layers: Sequence[tuple[str, int, Array]],
    *,
    overlay: Series,
    marks: Sequence[Mark] = (),
) -> Chart | None:
    """Areas (name, colour, values) on top of each other over steps, or None where all are 0 or absent.

    The axis ends a little over the 98th percentile of the sums, so one slow step does not flatten the rest.

    Args:
        overlay: a curve from 0 on, drawn over the areas where it has a value above 0.
    """
    filled = [(name, colour, np.nan_to_num(y)) for name, colour, y in layers if np.nansum(y) > 0]
    if not filled:
        return None
    total = np.sum([y for _, _, y in filled], axis=0)
    highest, top = float(total.max()), 1.3 * float(np.percentile(total, 98))
    note = f"Cut at {top:.3g}; the highest is {highest:.4g}." if highest > top else ""
    top = min(top, 1.05 * highest)
    frame = _Frame(x_range=_x_range([x]), y_range=(0.0, top))
    _axes(frame)
    edges_x = x if len(x) > 1 else np.array(frame.x_range)
    below = np.zeros(len(edges_x))
    for name, colour, y in filled:
        above = below + (y if len(x) > 1 else np.repeat(y, 2))
        outline = [*zip(edges_x, above, strict=True), *zip(edges_x[::-1], below[::-1], strict=True)]
        points = " ".join(f"{frame.x(a):.1f},{frame.y(min(b, top)):.1f}" for a, b in outline)
        frame.parts.append(
            f'<polygon class="area c{colour}" points="{points}"><title>{escape(name)}</title></polygon>'
        )
        below = above
    _marks(frame, marks)
    curves = [overlay] if np.nansum(overlay.y) > 0 else []
    for one in curves:
        _curve(frame, replace(one, y=np.minimum(one.y, top)))
    drawn = [*filled, *((one.name, one.colour, one.y) for one in curves)]
    summary = "; ".join(f"{name} {_extent(y)}" for name, _, y in drawn)
    return Chart(
        title=title,
        unit=unit,
        svg=_svg(frame, f"{title}, {unit}, stacked, over steps. {summary}."),
        legend=[
            *((name, colour, "area") for name, colour, _ in filled),
            *((one.name, one.colour, one.style) for one in curves),
        ],
        data=_data(frame, [(name, x, y) for name, _, y in drawn]),
        note=note,
    )


def bar_chart(
    title: str, unit: str, labels: Sequence[str], heights: Sequence[float]
) -> Chart | None:
    """Bars side by side, or None where all are 0. At most about ten labels are written out."""
    if not any(height > 0 for height in heights):
        return None
    frame = _Frame(
        x_range=(0.0, float(len(heights))), y_range=_linear_range(np.array(heights), from_zero=True)
    )
    _axes(frame, x_ticks=False)
    every = math.ceil(len(labels) / 9)
    for i, (label, height) in enumerate(zip(labels, heights, strict=True)):
        left, right, top = frame.x(i + 0.08), frame.x(i + 0.92), frame.y(height)
        frame.parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{_BOTTOM - top:.1f}"><title>{escape(label)}: {height:g}</title></rect>'
        )
        if i % every == 0:
            frame.parts.append(
                f'<text class="xl" x="{(left + right) / 2:.1f}" y="{_BOTTOM + 24}">{escape(label)}</text>'
            )
    summary = ", ".join(
        f"{label}: {height:g}" for label, height in zip(labels, heights, strict=True)
    )
    return Chart(
        title=title,
        unit=unit,
        svg=_svg(frame, f"{title}, {unit}. {summary}."),
        legend=[],
        data=Markup(
            json.dumps({"labels": list(labels), "heights": list(heights)}).replace("<", "\\u003c")
        ),
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) within [low, high], at most `most + 1`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if len(powers) <= 3 else (1,)
    found = [m * 10.0**p for p in powers for m in multiples if low <= m * 10.0**p <= high]
    return found[:: math.ceil(len(found) / 7)] if found else [low, high]


def _axes(frame: _Frame, *, x_ticks: bool = True) -> None:
    low, high = frame.y_range
    for value in _log_ticks(low, high) if frame.log_y else ticks(low, high, 5):
        if frame.whole and value != round(value):
            continue
        y = frame.y(value)
        frame.parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        frame.parts.append(f'<text class="yl" x="{_LEFT - 7}" y="{y:.1f}">{tick(value)}</text>')
    frame.parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>'
    )
    if x_ticks:
        frame.parts.append(f'<text x="{_LEFT}" y="{_BOTTOM + 24}">step</text>')
        clear = (v for v in ticks(*frame.x_range, 6) if v == round(v) and frame.x(v) > _LEFT + 75)
        for value in clear:
            frame.parts.append(
                f'<text class="xl" x="{frame.x(value):.1f}" y="{_BOTTOM + 24}">{tick(value)}</text>'
            )


def _marks(frame: _Frame, marks: Iterable[Mark]) -> None:
    for mark in marks:
        if frame.x_range[0] <= mark.x <= frame.x_range[1]:
            x = f"{frame.x(mark.x):.1f}"
            frame.parts.append(
                f'<line class="mark {mark.kind}" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_BOTTOM}">'
                f"<title>{mark.kind} at step {mark.x:g}</title></line>"
            )


def _curve(frame: _Frame, one: Series) -> None:
    classes = f"{one.style} c{one.colour}"
    known = np.isfinite(one.y) & np.isfinite(one.x)
    points = [
        (frame.x(x), frame.y(y)) if ok else None
        for x, y, ok in zip(one.x, one.y, known, strict=True)
    ]
    around = [None, *points, None]
    alone = [p for i, p in enumerate(points) if p and not around[i] and not around[i + 2]]
    if one.style != "dots":
        path, pen_down = [], False
        for point in points:
            if point is not None:
                path.append(f"{'L' if pen_down else 'M'}{point[0]:.1f} {point[1]:.1f}")
            pen_down = point is not None
        frame.parts.append(f'<path class="{classes}" d="{"".join(path)}"/>')
    for point in (p for p in points if p) if one.style == "dots" else alone:
        frame.parts.append(
            f'<circle class="dot c{one.colour}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="4"/>'
        )


def _x_range(xs: Sequence[Array]) -> tuple[float, float]:
    low = float(min(np.nanmin(x) for x in xs))
    high = float(max(np.nanmax(x) for x in xs))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _linear_range(values: Array, *, from_zero: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if from_zero:
        low = min(low, 0.0)
    if high <= low:
        return (
            (low - max(abs(low), 1e-9) / 2, high + max(abs(high), 1e-9) / 2) if high else (0.0, 1.0)
        )
    pad = 0.05 * (high - low)
    return (low if from_zero and low == 0 else low - pad, high + pad)


def _log_range(values: Array) -> tuple[float, float]:
    return float(values.min()) / 1.2, float(values.max()) * 1.2


def _extent(y: Array) -> str:
    known = y[np.isfinite(y)]
    return f"from {number(known[0].item())} to {number(known[-1].item())}"


def _svg(frame: _Frame, label: str) -> Markup:
    body = "".join(frame.parts)
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(label)}">{body}'
        f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{_BOTTOM}"/></svg>'
    )


def _data(frame: _Frame, series: Sequence[tuple[str, Array, Array]]) -> Markup:
    """Six significant digits of every point; null where there is no value."""
    payload = {
        "x_range": frame.x_range,
        "x_pixels": [_LEFT, _RIGHT],
        "width": _WIDTH,
        "series": [{"name": name, "x": _rounded(x), "y": _rounded(y)} for name, x, y in series],
    }
    return Markup(json.dumps(payload, separators=(",", ":")).replace("<", "\\u003c"))


def _rounded(values: Array) -> list[float | None]:
    # Steps are whole numbers and may have more than six digits.
    return [
        None if not math.isfinite(v) else (int(v) if v == int(v) else float(f"{v:.6g}"))
        for v in values.tolist()
    ]


def smoothed(y: Array, span: float) -> Array:
    """Average over neighbours on both sides, weighted exp(-distance / span); NaN is skipped.

    Two-sided, so that a falling curve is not drawn late.
    """
    if not len(y):
        return y
    known = np.isfinite(y)
    values, weights = np.where(known, y, 0.0), known.astype(np.float64)
    reach = min(len(y), math.ceil(4 * span))
    kernel = np.exp(-np.abs(np.arange(-reach, reach + 1)) / max(span, 1e-9))
    total = np.convolve(values, kernel)[reach : reach + len(y)]
    weight = np.convolve(weights, kernel)[reach : reach + len(y)]
    return np.divide(total, weight, out=np.full_like(y, np.nan), where=known)
