"""How much more validation loss over the share of rows that travel, as plain SVG for a page of documentation. Pure."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 730, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 560, 24, 330
_STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#1a1d21}.soft{fill:#5b636e}.grid{stroke:#dfe3e8}.zero{stroke:#5b636e}"
    ".line{fill:none;stroke-width:2}"
    ".a{stroke:#0072b2;fill:#0072b2}.b{stroke:#d55e00;fill:#d55e00}.c{stroke:#009e73;fill:#009e73}.line{fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#e8eaed}.soft{fill:#a2abb5}.grid{stroke:#343a41}"
    ".zero{stroke:#a2abb5}.a{stroke:#4fb0f0;fill:#4fb0f0}.b{stroke:#f58a42;fill:#f58a42}.c{stroke:#4cc9a0;fill:#4cc9a0}.line{fill:none}}</style>"
)

Row = Mapping[str, Any]


def picture(lines: Mapping[str, Sequence[Row]], points: Mapping[str, Row], title: str) -> str:
    """`lines`: at most three, by name, of rows with rows_pct, gap_pct and gap_sd; `points` stand by themselves."""
    rows = [row for of_line in lines.values() for row in of_line] + [*points.values()]
    low = min(0.0, *(row["gap_pct"] - (row["gap_sd"] or 0) for row in rows))
    high = max(0.0, *(row["gap_pct"] + (row["gap_sd"] or 0) for row in rows))
    spare = 0.05 * (high - low) or 0.01
    low, high = low - spare, high + spare

    def x(pct: float) -> float:
        return _LEFT + pct / 100 * (_RIGHT - _LEFT)

    def y(gap_pct: float) -> float:
        return _BOTTOM - (gap_pct - low) / (high - low) * (_BOTTOM - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{_STYLE}'
    ]
    for pct in range(0, 101, 20):
        parts += [
            f'<line class="grid" x1="{x(pct):.1f}" x2="{x(pct):.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>',
            f'<text class="soft" x="{x(pct):.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{pct}</text>',
        ]
    for gap_pct in range(math.ceil(low), math.floor(high) + 1):
        kind = "zero" if gap_pct == 0 else "grid"
        parts += [
            f'<line class="{kind}" x1="{_LEFT}" x2="{_RIGHT}" y1="{y(gap_pct):.1f}" y2="{y(gap_pct):.1f}"/>',
            f'<text class="soft" x="{_LEFT - 8}" y="{y(gap_pct) + 4:.1f}" text-anchor="end">{gap_pct} %</text>',
        ]
    parts += [
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_BOTTOM + 38}" text-anchor="middle">rows that travel, % of slots</text>',
        f'<text x="{_LEFT}" y="14">validation loss above that with all rows, same seed</text>',
    ]
    for place, (name, of_line) in enumerate(lines.items()):
        kind, ordered = "abc"[place], sorted(of_line, key=lambda row: row["rows_pct"])
        path = " ".join(f"{x(r['rows_pct']):.1f},{y(r['gap_pct']):.1f}" for r in ordered)
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        for row in ordered:
            parts += _dot(x(row["rows_pct"]), row, y, kind)
        legend_y = _TOP + 16 + 20 * place
        parts += [
            f'<circle class="{kind}" cx="{_RIGHT + 14}" cy="{legend_y - 4}" r="4"/>',
            f'<text x="{_RIGHT + 24}" y="{legend_y}">{escape(name)}</text>',
        ]
    for name, row in points.items():
        at_x, at_y = x(row["rows_pct"]), y(row["gap_pct"])
        parts += _dot(at_x, row, y, "")
        anchor, shift = ("end", -8) if row["rows_pct"] > 70 else ("start", 8)
        parts.append(
            f'<text class="soft" x="{at_x + shift:.1f}" y="{at_y - 6:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _dot(at_x: float, row: Row, y: Any, kind: str) -> list[str]:
    """With its standard deviation."""
    gap_pct, deviation = row["gap_pct"], row["gap_sd"] or 0.0
    colour = f' class="{kind}"' if kind else ' stroke="#808890" fill="#808890"'
    return [
        f'<line{colour} x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{y(gap_pct - deviation):.1f}" y2="{y(gap_pct + deviation):.1f}"/>',
        f'<circle{colour} cx="{at_x:.1f}" cy="{y(gap_pct):.1f}" r="4"/>',
    ]
