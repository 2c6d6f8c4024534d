"""The report's HTML, as a Jinja template. The policy in its head forbids any request at all."""

TEMPLATE = """
{% macro key(name, classes) %}<li><i class="key {{ classes }}"></i>{{ name }}</li>{% endmacro %}
{% macro figure(chart) %}
<figure class="chart">
<figcaption><b>{{ chart.title }}</b> <span>{{ chart.unit }}</span></figcaption>
{% if chart.legend | length > 1 %}
<ul class="legend">{% for name, colour, style in chart.legend %}{{ key(name, style ~ " c" ~ colour) }}{% endfor %}</ul>
{% endif %}
<output hidden></output>
{{ chart.svg }}
{% if chart.note %}<p class="note">{{ chart.note }}</p>{% endif %}
<script type="application/json">{{ chart.data }}</script>
</figure>
{% endmacro %}
{% macro picture(map, caption=true) %}
<figure>
{% if caption %}<figcaption><b>{{ map.title }}</b></figcaption>{% endif %}

<div class="map">
<div class="y"><span>{{ map.top }}</span><span>{{ map.bottom }}</span></div>
<div style="height:{{ map.height_px }}px"><img alt="{{ map.alt }}" src="{{ map.uri }}"></div>
<div class="x"><span>{{ map.left }}</span><span>{{ map.right }}</span></div>
</div>
</figure>
{% endmacro %}
{% macro pictures(maps) %}<div class="maps{{ ' dense' if maps | length > 16 }}">{% for map in maps %}{{ picture(map) }}{% endfor %}</div>{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{ run.name }} - moesys report</title>
<style>{{ style | safe }}</style>
</head>
<body>
<main>
<header>
<h1>{{ run.name }} <span class="status{{ ' ended' if run.ended }}">{{ facts.status }}</span></h1>
<p class="lead">{{ lead }}</p>
<nav aria-label="Sections">{% for section in sections %}<a href="#{{ section.id }}">{{ section.title }}</a>{% endfor %}</nav>
</header>
<div class="tiles">
{% for tile in tiles %}
<div class="tile"><span>{{ tile.label }}</span><b>{{ tile.value }}</b><span>{{ tile.detail }}</span></div>
{% endfor %}
</div>
{% if not run.num_steps %}<p class="note">No step has been recorded yet.</p>{% endif %}
{% for section in sections %}
<section id="{{ section.id }}">
<h2>{{ section.title }}</h2>
{% if section.id == "time" %}
<div class="side">
{% for chart in section.charts %}{{ figure(chart) }}{% endfor %}
<div class="card scroll"><table>
<tr><th>part</th><th class="r">total</th><th class="r">mean</th><th class="r">of step</th><th class="share"></th></tr>
{% for row in section.content.rows %}
<tr><td>{{ row.part }}</td><td class="r">{{ row.total }}</td><td class="r">{{ row.mean }}</td>
{% if row.percent is none %}<td></td><td></td>
{% else %}<td class="r">{{ row.percent }}%</td><td class="share"><i class="key c{{ row.colour }} area" style="width:{{ row.percent }}%"></i></td>{% endif %}</tr>
{% endfor %}
</table>
{% if section.content.between %}<p class="note">Evaluations and checkpoints run between steps.</p>{% endif %}
</div>
</div>
{% else %}
{% if section.charts %}<div class="charts">{% for chart in section.charts %}{{ figure(chart) }}{% endfor %}</div>{% endif %}
{% endif %}
{% if section.id == "loss" and marks %}
<ul class="legend">{% for mark in marks %}{{ key(mark ~ " here, in every chart", mark) }}{% endfor %}</ul>
{% endif %}
{% if section.id == "balance" and section.content %}
{% set load = section.content %}
<h3>Load of each expert over time</h3>
<p class="note">{% if load.stride > 1 %}One step in {{ load.stride }} is sampled. {% endif %}Tokens of an expert / mean of its layer, on one scale everywhere; steps to the right, experts downwards.</p>
<div class="scale"><span>1/{{ "%g" | format(load.end) }} or less</span><i style="background:{{ load.gradient }}"></i><span>{{ "%g" | format(load.end) }} times the mean or more</span>
<i class="dead"></i><span>no token</span></div>
{{ pictures(load.layers) }}
<h3>{{ load.final.title }}</h3>
{% if load.final_cells %}
<div class="card scroll"><table class="matrix">
<tr><th scope="row">expert</th>{% for expert in range(load.final_cells | map("length") | max) %}<th scope="col">{{ expert }}</th>{% endfor %}</tr>
{% for row in load.final_cells %}
<tr><th scope="row">layer&nbsp;{{ loop.index0 }}</th>{% for value, background, ink in row %}<td style="background:{{ background }};color:{{ ink }}">{{ "%.2f" | format(value) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% else %}
{{ picture(load.final, caption=false) }}
{% endif %}
{% endif %}
{% if section.id == "layers" %}
<div class="card scroll"><table>
<tr><th class="r">layer</th><th class="r">max/mean load</th><th class="r">router entropy, nats</th><th class="r">dropped slots</th><th class="r">expert similarity</th><th class="r">divergence of sources, bits</th></tr>
{% for row in section.content %}
<tr><td class="r">{{ row.layer }}</td><td class="r">{{ row.load }}</td><td class="r">{{ row.entropy }}</td><td class="r">{{ row.dropped }}</td><td class="r">{{ row.similarity }}</td><td class="r">{{ row.divergence }}</td></tr>
{% endfor %}
</table>
<p class="note">Load, entropy and dropped slots of the last step; similarity of weights and divergence of sources at the last evaluation.</p></div>
{% endif %}
{% if section.id == "placement" and section.content %}
{% set placed = section.content %}
{% if placed.rows %}
<div class="card scroll"><table>
<tr><th class="r">layer</th><th class="r">busiest rank / mean, had owners served all</th><th class="r">with copies</th><th class="r">experts with copies</th><th class="r">most holders</th><th class="r">prediction error</th></tr>
{% for row in placed.rows %}
<tr><td class="r">{{ row.layer }}</td><td class="r">{{ row.owners }}</td><td class="r">{{ row.levelled }}</td><td class="r">{{ row.with_copies }}</td><td class="r">{{ row.most }}</td><td class="r">{{ row.error }}</td></tr>
{% endfor %}
</table>
<p class="note">{{ placed.note }}</p></div>
{% endif %}
{% if placed.maps %}
<h3>Holders of each expert over time</h3>
<p class="note">{% if placed.maps.stride > 1 %}One step in {{ placed.maps.stride }} is sampled. {% endif %}Ranks of a group of parallel.ep that have the expert, its owner among them; steps to the right, experts downwards.</p>
<div class="scale"><span>1, its owner alone</span><i style="background:{{ placed.maps.gradient }}"></i><span>all {{ placed.maps.ranks }} ranks</span></div>
{{ pictures(placed.maps.layers) }}
{% endif %}
{% endif %}
{% if section.id == "throughput" and section.content %}
<div class="card scroll"><table>
<tr><th>node</th><th class="r">MiB to other nodes</th><th class="r">over the mean</th></tr>
{% for row in section.content %}
<tr><td>{{ row.node }}</td><td class="r">{{ row.sent }}</td><td class="r">{{ row.over_mean }}</td></tr>
{% endfor %}
</table>
<p class="note">Rows that the ranks of a node sent in the last step, the busiest nodes first.</p></div>
{% endif %}
{% if section.id == "compression" and section.content %}
<div class="card scroll"><table>
<tr><th class="r">layer</th><th class="r">chosen</th><th class="r">rows, % of slots</th><th class="r">relative error</th></tr>
{% for row in section.content %}
<tr><td class="r">{{ row.layer }}</td><td class="r">{{ row.codec }}</td><td class="r">{{ row.rows }}</td><td class="r">{{ row.error }}</td></tr>
{% endfor %}
</table>
<p class="note">Rows of the last step; how far a layer's output with codec and wire is from that without at the last evaluation, on its first batch.</p></div>
{% endif %}
{% if section.id == "sources" and section.content %}
{% set told = section.content %}
<h3>Experts that each source prefers, at step {{ "{:,}".format(told.step) }}</h3>
<p class="note">Share of a source's held-out text that goes to an expert / mean of the sources; 1 = no preference. Layers downwards, experts to the right.</p>
<div class="scale"><span>1/{{ "%g" | format(told.end) }} or less</span><i style="background:{{ told.gradient }}"></i><span>{{ "%g" | format(told.end) }} times the mean or more</span>
<i class="dead"></i><span>no token</span></div>
<div class="maps">{% for map in told.maps %}{{ picture(map) }}{% endfor %}</div>
{% endif %}
{% if section.id == "goodput" %}
<div class="card scroll">
<p>{{ section.content.summary }}</p>
<div class="whole" role="img" aria-label="{{ section.content.summary }}">{% for row in section.content.rows %}<i class="key {{ row.key }}" style="width:{{ row.width }}%" title="{{ row.part }} {{ row.time }}"></i>{% endfor %}</div>
<table>
<tr><th>part of the wall time</th><th class="r">time</th><th class="r">share</th><th></th></tr>
{% for row in section.content.rows %}
<tr><td><i class="key area {{ row.key }}"></i>{{ row.part }}</td><td class="r">{{ row.time }}</td><td class="r">{{ row.percent }}%</td><td class="soft">{{ row.about }}</td></tr>
{% endfor %}
</table>
{% if section.content.start %}<p class="note">A start, on average: {{ section.content.start }}.</p>{% endif %}
</div>
{% if section.content.stragglers %}
<h3>Stragglers</h3>
<div class="card scroll"><table>
<tr><th class="r">step</th><th class="r">rank</th><th>node</th><th class="r">times the median rank</th><th class="r">for steps</th></tr>
{% for one in section.content.stragglers %}
<tr><td class="r">{{ "{:,}".format(one.step) }}</td><td class="r">{{ one.rank }}</td><td>{{ one.node }}</td><td class="r">{{ "%.2f" | format(one.ratio) }}</td><td class="r">{{ one.window }}</td></tr>
{% endfor %}
</table>
{% if section.content.unshown_stragglers %}<p class="note">{{ section.content.unshown_stragglers }} earlier ones are not listed.</p>{% endif %}
</div>
{% endif %}
{% endif %}
{% if section.id == "history" %}
<div class="card scroll"><table>
<tr><th>when</th><th class="r">step</th><th>what</th><th></th></tr>
{% for row in section.content.rows %}
<tr><td>{{ row.when }}</td><td class="r">{{ "{:,}".format(row.step) }}</td><td>{{ row.what }}</td><td>{{ row.detail }}</td></tr>
{% endfor %}
</table></div>
{% for what, count in section.content.unshown.items() if count > 0 %}<p class="note">{{ count }} earlier {{ what }} are not listed.</p>{% endfor %}
{% endif %}
{% if section.id == "configuration" %}
<div class="card">{% for name, text in section.content.items() %}<details><summary>{{ name }}</summary><pre>{{ text }}</pre></details>{% endfor %}</div>
{% endif %}
{% if section.id == "environment" %}
<div class="card"><table class="wrap">{% for name, value in section.content.items() %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table></div>
{% endif %}
</section>
{% endfor %}
<footer>Made from {{ run.folder.name }}/metrics.jsonl: {{ "{:,}".format(run.num_steps) }} recorded steps{% if run.train.rows_per_bin > 1 %}, drawn as averages of {{ run.train.rows_per_bin }}{% endif %}.</footer>
</main>
<script>{{ script | safe }}</script>
</body>
</html>
""".lstrip()
