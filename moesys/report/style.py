"""The report's CSS, light and dark, wide and narrow; and the few lines of script that read a chart."""

import re
from collections.abc import Mapping


def _named(text: str) -> dict[str, str]:
    """Names and colours in turn."""
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


_LIGHT = _named("""
  page #f6f7f9 card #ffffff ink #1a1d21 soft #5b636e line #dfe3e8 grid #e9ecf0 good #00704f warn #a84a00
  c1 #0072b2 c2 #d55e00 c3 #009e73 c4 #a3618c c5 #56b4e9 c6 #c98500 c7 #8a929c c8 #1a1d21
""")
_DARK = _named("""
  page #14171a card #1d2125 ink #e8eaed soft #a2abb5 line #343a41 grid #2a2f35 good #3fd0a2 warn #f0a35e
  c1 #4fb0f0 c2 #f58a42 c3 #2fc296 c4 #dd96c4 c5 #86cdf5 c6 #f0c04a c7 #7d8690 c8 #ffffff
""")


def in_colours(rules: str) -> str:
    """Rules of a drawing that is no part of a page: each `var(--name)` is its colour, and the dark one where that is preferred."""

    def of(colours: Mapping[str, str]) -> str:
        return re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], rules)

    return f"{of(_LIGHT)}@media(prefers-color-scheme:dark){{{of(_DARK)}}}"


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; {_variables(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}
"""
    """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 12px; font-size: 1.2rem; }
h3 { margin: 26px 0 4px; font-size: 1rem; }
p { margin: 6px 0; }
.soft, .lead, figcaption span, .note { color: var(--soft); }
.status { display: inline-block; padding: 1px 10px; border: 1px solid currentColor; border-radius: 99px;
  font-size: .8rem; font-weight: 600; color: var(--warn); vertical-align: middle; margin-left: 8px; }
.status.ended { color: var(--good); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 14px; font-size: .9rem; }
a { color: var(--c1); text-decoration: none; }
a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(172px, 1fr)); gap: 12px; margin-top: 22px; }
.tile, figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: .82rem; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 14px; }
figure { position: relative; margin: 0; padding: 12px 14px 8px; min-width: 0; }
figcaption { font-size: .92rem; }
figcaption b { margin-right: 6px; }
svg { display: block; width: 100%; height: auto; margin-top: 4px; touch-action: pan-y; }
svg text { fill: var(--soft); font-size: 14px; font-variant-numeric: tabular-nums; }
.xl { text-anchor: middle; }
.yl { text-anchor: end; dominant-baseline: central; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); }
.line, .dashed, .faint { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 7 5; }
.faint { stroke-width: 1; opacity: .38; }
.area { stroke: none; } .bar { fill: var(--c1); }
.mark { stroke-width: 1.4; } .mark.resumed { stroke: var(--c3); stroke-dasharray: 5 4; }
.mark.stopped { stroke: var(--c2); stroke-dasharray: 2 3; }
path.c8 { stroke-width: 1.4; }
.cursor { stroke: var(--soft); visibility: hidden; }
"""
    + "".join(
        f"path.c{i} {{ stroke: var(--c{i}); }} polygon.c{i}, circle.c{i} {{ fill: var(--c{i}); }} "
        f".key.c{i} {{ --key: var(--c{i}); }}\n"
        for i in range(1, 9)
    )
    + """
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; margin: 2px 0 0; padding: 0; list-style: none; font-size: .84rem; color: var(--soft); }
.key { display: inline-block; width: 18px; margin-right: 6px; vertical-align: middle; border-top: 3px solid var(--key); }
.key.dashed { border-top-style: dashed; opacity: 1; }
.key.dots { width: 9px; height: 9px; border: 0; border-radius: 50%; background: var(--key); }
.key.area { width: 11px; height: 11px; border: 0; border-radius: 2px; background: var(--key); }
.key.resumed { --key: var(--c3); border-top: 2px dashed var(--key); } .key.stopped { --key: var(--c2); border-top: 2px dotted var(--key); }
output { position: absolute; inset: 9px 12px auto; padding: 2px; background: var(--card); font-size: .84rem; font-variant-numeric: tabular-nums; }
.note { font-size: .84rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); gap: 12px; }
.maps.dense { grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.map { display: grid; grid-template: auto auto / auto 1fr; gap: 2px 6px; margin-top: 6px; font-size: .76rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.map img { width: 100%; height: 100%; image-rendering: pixelated; border-radius: 3px; }
.map .y { display: flex; flex-direction: column; justify-content: space-between; text-align: right; line-height: 1; }
.map .x { grid-column: 2; display: flex; justify-content: space-between; }
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; margin: 10px 0; font-size: .84rem; color: var(--soft); }
.scale i { width: 190px; height: 12px; border-radius: 3px; }
.scale .dead { width: 12px; background: #000; border: 1px solid var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 5px 10px; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
td.r, th.r { text-align: right; }
tr:last-child > * { border-bottom: 0; }
.matrix td, .matrix th { padding: 3px 6px; text-align: center; border: 1px solid var(--card); font-size: .8rem; }
.share { width: 34%; min-width: 90px; }
.share i { display: block; height: 11px; border-radius: 2px; background: var(--key); }
.pale { opacity: .45; }
.whole { display: flex; height: 26px; margin: 10px 0 12px; border-radius: 4px; overflow: hidden; }
.whole .key { width: 0; height: 100%; margin: 0; border: 0; border-radius: 0; background: var(--key); }
.card { padding: 8px 14px; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 14px; align-items: start; }
details { border-bottom: 1px solid var(--line); padding: 5px 0; }
details:last-child { border-bottom: 0; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: 6px 0 8px; overflow-x: auto; font: .84rem/1.5 ui-monospace, monospace; }
.wrap td { white-space: normal; overflow-wrap: anywhere; }
footer { margin-top: 40px; font-size: .84rem; color: var(--soft); }
@media (max-width: 640px) {
  main { padding: 18px 12px 40px; }
  svg text { font-size: 22px; }
  th, td { padding: 4px 6px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .maps.dense { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile b { font-size: 1.25rem; }
  .line, .dashed { stroke-width: 3; }
}
@media print { body { background: #fff; } figure, .tile, .card { break-inside: avoid; } }
"""
)

SCRIPT = """
for (const figure of document.querySelectorAll('figure.chart')) {
  const data = JSON.parse(figure.querySelector('script').textContent);
  const svg = figure.querySelector('svg'), out = figure.querySelector('output');
  const cursor = svg.querySelector('.cursor');
  if (!data.series) continue;
  const [x0, x1] = data.x_range, [p0, p1] = data.x_pixels;
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (low < high) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid + 1; else high = mid; }
    return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
  };
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * data.width;
    const x = x0 + Math.min(1, Math.max(0, (at - p0) / (p1 - p0))) * (x1 - x0);
    const first = data.series[0], step = first.x[nearest(first.x, x)];
    const pixel = p0 + (step - x0) / (x1 - x0) * (p1 - p0);
    cursor.setAttribute('x1', pixel); cursor.setAttribute('x2', pixel); cursor.style.visibility = 'visible'; out.hidden = false;
    out.textContent = `step ${Math.round(step)}: ` + data.series.filter(s => s.x.length).map(s => {
      const y = s.y[nearest(s.x, step)];
      return `${s.name} ${y === null ? '-' : Number(y.toPrecision(5))}`;
    }).join(' · ');
  });
  svg.addEventListener('pointerleave', () => { cursor.style.visibility = 'hidden'; out.hidden = true; });
}
"""
