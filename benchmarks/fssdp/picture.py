"""Speedups of layers over ranks, a panel for each cluster and model, as plain SVG for a page of documentation. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_LEFT, _TOP, _WIDE, _HIGH, _GAP_X, _GAP_Y = 46, 44, 200, 150, 44, 52
_LEGEND = 150
_STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#1a1d21}.soft{fill:#5b636e}.grid{stroke:#dfe3e8}.zero{stroke:#5b636e}"
    ".line{fill:none;stroke-width:2.5}.faint{fill:none;stroke-width:1;opacity:.55}.dash{stroke-dasharray:5 3}"
    ".dot{stroke-dasharray:1.5 2.5}"
    ".a{stroke:#5b636e}.b{stroke:#0072b2}.c{stroke:#d55e00}.d{stroke:#009e73}"
    "@media(prefers-color-scheme:dark){text{fill:#e8eaed}.soft{fill:#a2abb5}.grid{stroke:#343a41}.zero{stroke:#a2abb5}"
    ".a{stroke:#a2abb5}.b{stroke:#4fb0f0}.c{stroke:#f58a42}.d{stroke:#4cc9a0}}</style>"
)
_KINDS = {"balanced": "line", "hecate": "faint dash", "eplb": "faint dot"}
"""Policies that are drawn, and how."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """Of one panel; both are logarithmic."""

    left: float
    top: float
    ranks: Sequence[int]
    low: float
    high: float

    def x(self, ranks: float) -> float:
        return self.left + _WIDE * _part(ranks, self.ranks[0], self.ranks[-1])

    def y(self, speedup: float) -> float:
        return self.top + _HIGH * (1 - _part(speedup, self.low, self.high))


def draw(rows: Sequence[Row]) -> str:
    """Of rows with cluster, model, ranks, zipf, policy and speedup: models below each other, clusters side by side."""
    clusters, models, skews = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("cluster", "model", "zipf")
    )
    shown = [row for row in rows if row["policy"] in _KINDS]
    ranks = sorted({row["ranks"] for row in shown})
    low = min(1.0, *(row["speedup"] for row in shown)) / 1.1
    high = max(row["speedup"] for row in shown) * 1.1
    right = _LEFT + len(clusters) * (_WIDE + _GAP_X)
    height = _TOP + len(models) * (_HIGH + _GAP_Y)
    title = "speedup of a layer over plain expert parallelism"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + _LEGEND} {height}" role="img" '
        f'aria-label="{title}">{_STYLE}',
        f'<text x="{_LEFT}" y="14">{title}, by ranks</text>',
    ]
    for column, cluster in enumerate(clusters):
        for line, model in enumerate(models):
            axes = _Axes(
                left=_LEFT + column * (_WIDE + _GAP_X),
                top=_TOP + line * (_HIGH + _GAP_Y),
                ranks=ranks,
                low=low,
                high=high,
            )
            own = [row for row in shown if (row["cluster"], row["model"]) == (cluster, model)]
            parts += [*_frame(axes, f"{model} on {cluster}"), *_lines(axes, own, skews)]
    return "\n".join([*parts, *_legend(right, skews), "</svg>"]) + "\n"


def _frame(axes: _Axes, title: str) -> list[str]:
    end, bottom = axes.left + _WIDE, axes.top + _HIGH
    parts = [f'<text x="{axes.left}" y="{axes.top - 8}">{escape(title)}</text>']
    for ranks in axes.ranks[::2]:
        x = axes.x(ranks)
        parts += [
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.top}" y2="{bottom}"/>',
            f'<text class="soft" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{ranks}</text>',
        ]
    for speedup in (0.5, 1, 2, 5, 10, 20, 50, 100):
        if axes.low <= speedup <= axes.high:
            kind, y = "zero" if speedup == 1 else "grid", axes.y(speedup)
            parts += [
                f'<line class="{kind}" x1="{axes.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>',
                f'<text class="soft" x="{axes.left - 6}" y="{y + 4:.1f}" text-anchor="end">{speedup}</text>',
            ]
    return parts


def _lines(axes: _Axes, rows: Sequence[Row], skews: Sequence[float]) -> list[str]:
    """Those of `balanced` above the others."""
    parts = []
    for policy, kind in reversed(_KINDS.items()):
        for colour, zipf in zip("abcd", skews, strict=False):
            own = [row for row in rows if (row["policy"], row["zipf"]) == (policy, zipf)]
            path = " ".join(
                f"{axes.x(row['ranks']):.1f},{axes.y(row['speedup']):.1f}"
                for row in sorted(own, key=lambda row: row["ranks"])
            )
            parts.append(f'<polyline class="{kind} {colour}" points="{path}"/>')
    return parts


def _legend(left: float, skews: Sequence[float]) -> list[str]:
    entries = [
        *(
            (f"line {colour}", f"Zipf {zipf:g}")
            for colour, zipf in zip("abcd", skews, strict=False)
        ),
        *((f"{kind} a", policy) for policy, kind in _KINDS.items()),
    ]
    parts = []
    for place, (kind, name) in enumerate(entries):
        y = _TOP + 12 + 20 * place + 14 * (place >= len(skews))
        parts += [
            f'<line class="{kind}" x1="{left}" x2="{left + 24}" y1="{y - 4}" y2="{y - 4}"/>',
            f'<text x="{left + 32}" y="{y}">{escape(name)}</text>',
        ]
    return parts


def _part(value: float, low: float, high: float) -> float:
    """Of the way from low to high."""
    return math.log(value / low) / math.log(high / low)
