"""Batch plans compared, as one self-contained HTML page. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from moesys.report.batch_columns import COLUMNS, cells
from moesys.report.batch_timeline import RULES
from moesys.report.style import STYLE

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Batch plans</title>
<style>{{ style|safe }}{{ rules|safe }}</style></head><body><main>
<h1>Which ranks work on which sequences</h1>
<p class="lead">{{ caption }}</p>
<figure class="scroll">{{ svg|safe }}</figure>
<p class="note">By formulas, of one step: nothing was run. Point at a piece to read which sequence it is.</p>
<h2>Figures</h2>
<div class="card scroll"><table>
<tr><th>policy</th>{% for head in heads %}<th class="r">{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td>{{ row.policy }}</td>{% for cell in cells(row) %}<td class="r">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% for policy, reason in refused.items() %}<p class="note">{{ policy }}: {{ reason }}</p>{% endfor %}
<p class="note">Times even work: the step over what it would take were the work even and nobody waited. Shares are of the time of
all ranks: idle, in which they wait for other ranks, and that in which they wait for keys of a ring, beyond what comes while they
work. Activations and tokens: of the fullest rank.</p>
</main></body></html>
"""


def render(
    svg: str, rows: Sequence[Mapping[str, Any]], refused: Mapping[str, str], caption: str
) -> str:
    """`svg` as batch_svg draws it; `rows` with a policy's name and the figures of `COLUMNS`; why others have none."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.from_string(_TEMPLATE).render(
        style=STYLE,
        rules=RULES,
        svg=svg,
        rows=rows,
        refused=refused,
        caption=caption,
        heads=[head for head, _ in COLUMNS.values()],
        cells=cells,
    )
