"""Validation loss over the share of rows that travel, as plain SVG for a page of documentation. Pure."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 720, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 560, 24, 330
_STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#1a1d21}.soft{fill:#5b636e}.grid{stroke:#dfe3e8}"
    ".line{fill:none;stroke-width:2}.band{fill:#1a1d21;fill-opacity:.1}"
    ".a{stroke:#0072b2;fill:#0072b2}.b{stroke:#d55e00;fill:#d55e00}.line{fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#e8eaed}.soft{fill:#a2abb5}.grid{stroke:#343a41}"
    ".band{fill:#e8eaed}.a{stroke:#4fb0f0;fill:#4fb0f0}.b{stroke:#f58a42;fill:#f58a42}.line{fill:none}}</style>"
)

Row = Mapping[str, Any]


def picture(
    lines: Mapping[str, Sequence[Row]], points: Mapping[str, Row], plain: Row, title: str
) -> str:
    """`lines`: at most two, by name, of rows with rows_pct, val_loss and val_loss_sd; `points` stand by themselves; `plain` is a
    band of one standard deviation to both sides."""
    rows = [row for of_line in lines.values() for row in of_line] + [*points.values(), plain]
    low = min(row["val_loss"] - (row["val_loss_sd"] or 0) for row in rows)
    high = max(row["val_loss"] + (row["val_loss_sd"] or 0) for row in rows)
    spare = 0.05 * (high - low) or 0.01
    low, high = low - spare, high + spare

    def x(pct: float) -> float:
        return _LEFT + pct / 100 * (_RIGHT - _LEFT)

    def y(loss: float) -> float:
        return _BOTTOM - (loss - low) / (high - low) * (_BOTTOM - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{_STYLE}'
    ]
    for pct in range(0, 101, 20):
        parts += [
            f'<line class="grid" x1="{x(pct):.1f}" x2="{x(pct):.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>',
            f'<text class="soft" x="{x(pct):.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{pct}</text>',
        ]
    for share in (0.05, 0.35, 0.65, 0.95):
        loss = low + share * (high - low)
        parts += [
            f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y(loss):.1f}" y2="{y(loss):.1f}"/>',
            f'<text class="soft" x="{_LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.3f}</text>',
        ]
    parts += [
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_BOTTOM + 38}" text-anchor="middle">rows that travel, % of slots</text>',
        f'<text x="{_LEFT}" y="14">validation loss, nats per token</text>',
    ]
    deviation = plain["val_loss_sd"] or 0.0
    top, bottom = y(plain["val_loss"] + deviation), y(plain["val_loss"] - deviation)
    parts += [
        f'<rect class="band" x="{_LEFT}" width="{_RIGHT - _LEFT}" y="{top:.1f}" height="{max(1.0, bottom - top):.1f}"/>',
        f'<text class="soft" x="{_RIGHT + 10}" y="{y(plain["val_loss"]) + 4:.1f}">all rows</text>',
    ]
    for place, (name, of_line) in enumerate(lines.items()):
        kind, ordered = "ab"[place], sorted(of_line, key=lambda row: row["rows_pct"])
        path = " ".join(f"{x(r['rows_pct']):.1f},{y(r['val_loss']):.1f}" for r in ordered)
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        for row in ordered:
            parts += _dot(x(row["rows_pct"]), row, y, kind)
        legend_y = _TOP + 16 + 20 * place
        parts += [
            f'<circle class="{kind}" cx="{_RIGHT + 14}" cy="{legend_y - 4}" r="4"/>',
            f'<text x="{_RIGHT + 24}" y="{legend_y}">{escape(name)}</text>',
        ]
    for name, row in points.items():
        at_x, at_y = x(row["rows_pct"]), y(row["val_loss"])
        parts += _dot(at_x, row, y, "")
        anchor, shift = ("end", -8) if row["rows_pct"] > 70 else ("start", 8)
        parts.append(
            f'<text class="soft" x="{at_x + shift:.1f}" y="{at_y - 6:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _dot(at_x: float, row: Row, y: Any, kind: str) -> list[str]:
    """With its standard deviation."""
    loss, deviation = row["val_loss"], row["val_loss_sd"] or 0.0
    colour = f' class="{kind}"' if kind else ' stroke="#808890" fill="#808890"'
    return [
        f'<line{colour} x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{y(loss - deviation):.1f}" y2="{y(loss + deviation):.1f}"/>',
        f'<circle{colour} cx="{at_x:.1f}" cy="{y(loss):.1f}" r="4"/>',
    ]
