"""The table of a sweep as a picture: each run a dot, each row's mean a line. Plain SVG, for a page of documentation."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

_ROW_PX, _TOP_PX, _BOTTOM_PX = 24, 40, 34
_PANELS = (
    ("validation loss", "val_losses", 300),
    ("max/mean load", "load_imbalance", 170),
    ("step ratio", "step_ratio", 170),
)
_GAP_PX, _CHARACTER_PX = 28, 7.3
_STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#1a1d21}.soft{fill:#5b636e}.grid{stroke:#dfe3e8}"
    ".dot{fill:#0072b2;fill-opacity:.55}.mean{stroke:#d55e00;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#e8eaed}.soft{fill:#a2abb5}.grid{stroke:#343a41}"
    ".dot{fill:#4fb0f0}.mean{stroke:#f58a42}}</style>"
)


def picture(lines: Sequence[dict[str, Any]], title: str) -> str:
    """`lines` of `table`, from the lowest mean validation loss down."""
    ordered = sorted(lines, key=lambda line: line["val_loss"])
    left = max((len(line["row"]) for line in ordered), default=0) * _CHARACTER_PX + 20
    height = _TOP_PX + _ROW_PX * len(ordered) + _BOTTOM_PX
    width = left + sum(panel[2] + _GAP_PX for panel in _PANELS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
        f'aria-label="{escape(title)}">{_STYLE}'
    ]
    for place, line in enumerate(ordered):
        y = _TOP_PX + _ROW_PX * (place + 0.5)
        parts.append(
            f'<text x="{left - 12:.0f}" y="{y + 4}" text-anchor="end">{escape(line["row"])}</text>'
        )
        parts.append(
            f'<line class="grid" x1="{left:.0f}" x2="{width - _GAP_PX:.0f}" y1="{y}" y2="{y}"/>'
        )
    x = left
    for head, key, panel_px in _PANELS:
        parts += _panel(ordered, head, key, x, panel_px, height)
        x += panel_px + _GAP_PX
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    ordered: Sequence[dict[str, Any]], head: str, key: str, x: float, width: int, height: int
) -> list[str]:
    values = [line[key] if isinstance(line[key], list) else [line[key]] for line in ordered]
    low, high = min(map(min, values)), max(map(max, values))
    spare = (high - low) * 0.06 or abs(high) * 0.01 or 1.0
    low, high = low - spare, high + spare

    def at(value: float) -> float:
        return x + (value - low) / (high - low) * width

    parts = [f'<text x="{x + width / 2:.0f}" y="20" text-anchor="middle">{escape(head)}</text>']
    for share in (0.1, 0.5, 0.9):
        value = low + share * (high - low)
        label = f'<text class="soft" x="{at(value):.1f}" y="{height - 10}" text-anchor="middle">'
        parts.append(f"{label}{_label(value, high - low)}</text>")
    for place, found in enumerate(values):
        y = _TOP_PX + _ROW_PX * (place + 0.5)
        parts += [f'<circle class="dot" cx="{at(v):.1f}" cy="{y}" r="4"/>' for v in found]
        mean = at(sum(found) / len(found))
        parts.append(
            f'<line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 7}" y2="{y + 7}"/>'
        )
    return parts


def _label(value: float, span: float) -> str:
    """As many decimals as tell labels apart that lie a third of `span` from each other."""
    return f"{value:.{max(0, 1 - math.floor(math.log10(span)))}f}"
