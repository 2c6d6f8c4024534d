"""Timelines of batch plans as one drawing: ranks over time, a panel for each plan, all on one axis. Pure.

A sequence has the same colour in all panels; those that the longest are not are paler. Of a pipeline forwards are lighter than
backwards.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from moesys.plan.batch.plan import BatchPlan
from moesys.plan.batch.timeline import BatchTimeline, Span
from moesys.plan.placement import Integers
from moesys.report.batch_boxes import Box, boxes
from moesys.report.chart import ticks
from moesys.report.numbers import tick
from moesys.report.style import in_colours

_COLOURS = 6
RULES = (
    ".batch{min-width:720px}.batch text{font:12px system-ui,sans-serif;fill:var(--soft)}"
    ".batch .name{font-size:13px;font-weight:600;fill:var(--ink)}.batch .value{fill:var(--ink)}"
    ".batch .end{text-anchor:end}.batch .mid{text-anchor:middle}.batch .rank{font-size:10px}"
    ".batch .idle{fill:var(--line);fill-opacity:.85}.batch .over{stroke:var(--soft);stroke-opacity:.3;stroke-width:.6}"
    ".batch .step{stroke:var(--ink);stroke-width:1.3}"
    ".batch .short{fill-opacity:.45}.batch .forward{fill-opacity:.6}.batch .short.forward{fill-opacity:.25}"
    ".batch .keys{fill:var(--ink)}.batch .beside{fill:var(--c7)}"
    + "".join(f".batch .s{i}{{fill:var(--c{i + 1})}}" for i in range(_COLOURS))
)
_LEFT, _WIDE, _RIGHT, _TOP, _GAP = 44.0, 640.0, 196.0, 70.0, 36.0
_ROWS_PX, _LEAST_ROW_PX, _MOST_ROW_PX, _LINE_PX = 192.0, 3.0, 13.0, 15.0
_MOST_ROWS = 64
_LEAST_BOX_PX = 2.0
_KEYS_PX, _STAGES_GAP = 3.0, 3.0
_LONG_SHARE, _MOST_LONG = 0.5, 24
"""Long are the longest sequences with this share of all tokens, at most so many."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A plan as it is drawn."""

    name: str
    plan: BatchPlan
    timeline: BatchTimeline
    """Of `drawn_ranks`."""
    figures: Sequence[tuple[str, str]]
    """(value, what it is), beside it."""


def drawn_ranks(num_ranks: int, stages: int) -> list[int]:
    """Data ranks that can be told apart: all, or as many evenly from the first to the last."""
    number = min(num_ranks, max(2, _MOST_ROWS // stages))
    return [round(i * (num_ranks - 1) / max(1, number - 1)) for i in range(number)]


def batch_svg(panels: Sequence[Panel], caption: str) -> str:
    """For a page with `RULES` and the colours of the report's style; `standalone` makes it a file."""
    end_s = max(panel.timeline.step_s for panel in panels) or 1.0
    colours = _colours(panels[0].plan.lengths_S)
    top, parts = _TOP, []
    for panel in panels:
        drawn = _Drawn(panel, colours, top, _WIDE / end_s)
        parts += drawn.parts()
        top = drawn.bottom + _GAP
    bottom = top - _GAP
    steps = ", ".join(f"{panel.name} {panel.timeline.step_s:.4g} s" for panel in panels)
    lines = [
        f'<svg class="batch" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDE + _RIGHT:g} {bottom + 26:g}" '
        f'role="img" aria-label="What each rank works on over a step: {escape(steps)}">',
        f'<text class="value" x="{_LEFT:g}" y="12">{escape(caption)}</text>',
        *_legend([spans for panel in panels for spans in panel.timeline.spans.values()]),
        *_axis(end_s, bottom),
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def standalone(svg: str) -> str:
    """The same drawing with its colours inside."""
    head, end, rest = svg.partition(">\n")
    return f"{head}{end}<style>{in_colours(RULES)}</style>\n{rest}"


@dataclass(frozen=True, kw_only=True)
class _Colours:
    """Of sequences, by their places in the batch."""

    of: Mapping[int, int]
    long: frozenset[int]

    def kind(self, box: Box) -> str:
        """CSS classes."""
        if not box.sequences:
            return "beside"
        kind = f"s{self.of[box.sequences[0]]}"
        kind += "" if box.sequences[0] in self.long else " short"
        return kind + (" forward" if box.phase == "forward" else "")


def _colours(lengths_S: Integers) -> _Colours:
    order_S = np.argsort(-lengths_S, kind="stable")
    before_S = np.cumsum(lengths_S[order_S]) - lengths_S[order_S]
    number = min(_MOST_LONG, int((before_S < _LONG_SHARE * lengths_S.sum()).sum()))
    order = order_S.tolist()
    return _Colours(
        of={sequence: place % _COLOURS for place, sequence in enumerate(order)},
        long=frozenset(order[:number]),
    )


class _Drawn:
    """A panel at its place."""

    def __init__(self, panel: Panel, colours: _Colours, top: float, px_per_s: float) -> None:
        self._panel, self._colours, self._top, self._px_per_s = panel, colours, top, px_per_s
        self._rows = panel.timeline.spans
        row_px = min(_MOST_ROW_PX, max(_LEAST_ROW_PX, _ROWS_PX / len(self._rows)))
        self._row_px, self._box_px = row_px, row_px - (1.0 if row_px > 5 else 0.4)
        self._stages = 1 + max(stage for _, stage in self._rows)
        self._rows_bottom = self._y(len(self._rows) - 1) + row_px
        self.bottom = max(self._rows_bottom, top + _LINE_PX * len(panel.figures))

    def _y(self, row: int) -> float:
        apart = _STAGES_GAP if self._stages > 1 else 0.0
        return self._top + row * self._row_px + row // self._stages * apart

    def parts(self) -> Iterator[str]:
        name, top = escape(self._panel.name), self._top
        yield f'<text class="rank end" x="{_LEFT - 6:g}" y="{top - 8:g}">rank</text>'
        yield f'<text class="name" x="{_LEFT:g}" y="{top - 8:g}">{name}</text>'
        step_px = self._panel.timeline.step_s * self._px_per_s
        last_named = len(self._rows) - self._stages
        for row, (rank, stage) in enumerate(self._rows):
            y = self._y(row)
            yield _box("idle", 0.0, step_px, y, self._box_px)
            is_named = self._row_px * self._stages >= 10 or row in (0, last_named)
            if not stage and is_named:
                y += self._box_px / 2 + 3.5
                yield f'<text class="rank end" x="{_LEFT - 6:g}" y="{y:.1f}">{rank}</text>'
        for box, first, rows in self._blocks():
            yield from self._block(box, self._y(first), rows)
        end = _LEFT + step_px
        yield f'<path class="step" d="M{end:.1f} {top - 3:.1f}V{self._rows_bottom + 2:.1f}"/>'
        x = _LEFT + _WIDE + 80
        for line, (value, what) in enumerate(self._panel.figures):
            y = top + 10 + _LINE_PX * line
            yield f'<text class="value end" x="{x:g}" y="{y:g}">{escape(value)}</text>'
            yield f'<text x="{x + 6:g}" y="{y:g}">{escape(what)}</text>'

    def _blocks(self) -> list[tuple[Box, int, int]]:
        """Boxes, the first of their rows, how many: those that are the same in rows beside each other are one."""
        found: list[tuple[Box, int, int]] = []
        above: dict[tuple, int] = {}
        least_s = _LEAST_BOX_PX / self._px_per_s
        for row, spans in enumerate(self._rows.values()):
            here: dict[tuple, int] = {}
            for box in boxes(
                spans,
                with_phases=self._stages > 1,
                long=self._colours.long,
                least_s=least_s,
            ):
                same = (box.begin_s, box.end_s, *box.sequences)
                if same in above and box.sequences:
                    at = here[same] = above[same]
                    found[at] = (*found[at][:2], found[at][2] + 1)
                else:
                    here[same] = len(found)
                    found.append((box, row, 1))
            above = here
        return found

    def _block(self, box: Box, y: float, rows: int) -> Iterator[str]:
        x, wide = box.begin_s * self._px_per_s, (box.end_s - box.begin_s) * self._px_per_s
        wide -= 0.3 if wide > 1 else 0.0
        high = (rows - 1) * self._row_px + self._box_px
        yield _box(self._colours.kind(box), x, wide, y, high, box.title(self._panel.plan))
        if (keys := box.keys_s * self._px_per_s) > 0.1:
            strip = min(_KEYS_PX, high / 3)
            yield _box("keys", x + wide - keys, keys, y + high - strip, strip)


def _box(kind: str, x: float, wide: float, y: float, high: float, title: str = "") -> str:
    path = f'<path class="{kind}" d="M{_LEFT + x:.1f} {y:.1f}h{wide:.1f}v{high:.1f}h-{wide:.1f}z"'
    return f"{path}><title>{escape(title)}</title></path>" if title else f"{path}/>"


def _axis(end_s: float, bottom: float) -> Iterator[str]:
    unit, per_s = ("s", 1.0) if end_s >= 0.5 else ("ms", 1e3)
    values = ticks(0.0, end_s * per_s, 6)
    for value in values:
        x = _LEFT + value / (end_s * per_s) * _WIDE
        label = f"{tick(value)} {unit}" if value == values[-1] else tick(value)
        yield f'<path class="over" d="M{x:.1f} {_TOP - 3:g}V{bottom + 5:.1f}"/>'
        yield f'<text class="mid" x="{x:.1f}" y="{bottom + 19:.1f}">{label}</text>'


def _legend(rows: Sequence[Sequence[Span]]) -> Iterator[str]:
    """Of what there is in these rows."""
    hues = [f"s{i}" for i in range(_COLOURS)]
    entries = [(hues, "long sequences"), ([f"{hue} short" for hue in hues], "others")]
    if any(span.stage for row in rows for span in row):
        entries.append((["s0 forward", "s0"], "forward, backward of a rank's stages"))
    if any(span.kind == "keys" for row in rows for span in row):
        entries.append((["keys"], "wait for keys"))
    entries.append((["idle"], "idle"))
    x, y = 0.0, 24.0
    for kinds, what in entries:
        for kind in kinds:
            strip = _KEYS_PX if kind == "keys" else 9.0
            yield _box(kind, x, 9.0, y + 9 - strip, strip)
            x += 10.0
        yield f'<text x="{_LEFT + x + 4:g}" y="{y + 9:g}">{what}</text>'
        x += 6.4 * len(what) + 18
