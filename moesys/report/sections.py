"""The charts of a report, section by section: what is drawn of which column, and when there is nothing to draw."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesys.report.batch_section import batch_charts
from moesys.report.chart import Chart, bar_chart, stacked_chart
from moesys.report.figures import time_split
from moesys.report.goodput_section import goodput_content
from moesys.report.lines import Lines
from moesys.report.load_maps import load_maps
from moesys.report.numbers import NONE, duration, item, number, short
from moesys.report.placement_section import placement_charts, placement_content
from moesys.report.run import PARTS, Run
from moesys.report.sources import preferences

_MOST_NODES = 64


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with charts, and what else the template shows for the section of this id."""

    id: str
    title: str
    charts: list[Chart] = field(default_factory=list)
    content: Any = None


def chart_sections(run: Run, *, unigram_bits_per_byte: float | None) -> list[Section]:
    """The sections that have something to show, in the page's order."""
    lines = Lines(run)
    every = (
        _section("loss", "Loss", _loss(lines, unigram_bits_per_byte)),
        _section("schedule", "Optimizer", _optimizer(lines)),
        _section("balance", "Expert load", _balance(lines), run.loads and load_maps(run.loads)),
        _section("layers", "MoE layers", [], _layers(run)),
        _section("placement", "Expert placement", placement_charts(lines), placement_content(run)),
        _section("batches", "Batches of documents", batch_charts(lines)),
        _section("sources", "Sources of text", _sources(lines), preferences(run.last_eval)),
        _section("time", "Where the time goes", [_step_time(lines)], _time_table(run)),
        _section("goodput", "Goodput", [], goodput_content(run)),
        _section("throughput", "Throughput", _throughput(lines), _uplinks(run)),
        _section("compression", "Compression", _compression(lines), _compressed_layers(run)),
        _section("documents", "Training documents", _documents(run)),
    )
    return [section for section in every if section is not None]


def _section(
    id: str, title: str, charts: list[Chart | None], content: Any = None
) -> Section | None:
    drawn = [chart for chart in charts if chart is not None]
    return Section(id=id, title=title, charts=drawn, content=content) if drawn or content else None


def _loss(lines: Lines, unigram: float | None) -> list[Chart | None]:
    bits = "comparable across tokenizers"
    return [
        lines.loss("Cross-entropy", "nats per token", "loss", "val_loss", None),
        lines.loss("Bits per byte", bits, "bits_per_byte", "val_bits_per_byte", unigram),
        lines.chart_unless_zero(
            "Multi-token prediction",
            "nats per token, mean over depths",
            lines.of("mtp_loss", "further tokens", 3),
        ),
    ]


def _optimizer(lines: Lines) -> list[Chart | None]:
    rate, norm = lines.of("lr", "learning rate", 1), lines.of("grad_norm", "norm", 5)
    return [
        lines.chart("Learning rate", "per step", rate, from_zero=True),
        lines.chart("Gradient norm", "all parameters, before clipping", norm, log_y=True),
    ]


def _balance(lines: Lines) -> list[Chart | None]:
    return [
        lines.chart(
            "Load imbalance",
            "tokens of the fullest expert / mean; 1 = even",
            lines.of("max_load_imbalance", "worst layer", 6),
            lines.of("load_imbalance", "mean over layers", 1),
        ),
        lines.chart_unless_zero(
            "Balance losses",
            "before their coefficients, summed over layers",
            lines.of("aux_loss", "balance", 3),
            lines.of("z_loss", "z", 4),
        ),
        lines.chart_unless_zero(
            "Router entropy",
            "nats per token, mean over layers; ln(experts) = undecided, 0 = sure",
            lines.of("router_entropy", "entropy", 1),
        ),
        lines.of_evals(
            "Expert similarity",
            "mean cosine of two experts' weights, mean over layers; 1 = copies",
            "expert_similarity",
        ),
        lines.chart_unless_zero(
            "Dead experts",
            "experts without a token, summed over layers",
            lines.of("dead_experts", "dead experts", 2),
        ),
        lines.chart_unless_zero(
            "Dropped slots",
            "token-expert pairs over capacity, per step",
            lines.of("dropped_slots", "dropped", 2),
        ),
    ]


def _step_time(lines: Lines) -> Chart | None:
    parts = [np.nan_to_num(lines.run.column(f"{part}_ms")) for part in PARTS]
    other = np.maximum(np.nan_to_num(lines.run.column("step_ms")) - sum(parts), 0)
    named = zip((*PARTS, "other"), (*parts, other), strict=True)
    return stacked_chart(
        "Step time",
        "milliseconds",
        lines.steps,
        [(name, _part_colour(name), y) for name, y in named],
        overlay=lines.of("exchange_ms", "exchange, within forward and backward", 8),
        marks=lines.marks,
    )


def _part_colour(part: str) -> int:
    return (*PARTS, "other").index(part) + 1


def _time_table(run: Run) -> dict[str, Any] | None:
    split = time_split(run)
    if not split:
        return None
    step_ms = sum(split.values())

    def row(name: str, ms: float, colour: int, count: int, share: bool = True) -> dict[str, Any]:
        return {
            "part": name,
            "colour": colour,
            "total": duration(ms / 1e3),
            "mean": f"{ms / count:.4g} ms" if count else NONE,
            "percent": f"{100 * ms / step_ms:.1f}" if share else None,
        }

    rows = [row(part, ms, _part_colour(part), run.num_steps) for part, ms in split.items()]
    exchange_ms = run.totals["exchange_ms"]
    if exchange_ms:
        rows.append(row("of these, exchange", exchange_ms, 8, run.num_steps))
    between = [
        row(name, run.totals[column], 0, count, share=False)
        for name, column, count in (
            (f"{run.num_evals} evaluations", "eval_ms", run.num_evals),
            (f"{run.num_checkpoints} checkpoints", "checkpoint_ms", run.num_checkpoints),
        )
        if count
    ]
    return {"rows": [*rows, *between], "between": bool(between)}


def _throughput(lines: Lines) -> list[Chart | None]:
    tokens = lines.of("tokens_per_s", "tokens/s", 3)
    mfu = lines.of("mfu", "MFU", 4, scale=100)
    tflops = lines.of("tflops_per_rank", "TFLOP/s", 4)
    sent = lines.of("sent_bytes", "sent", 1, scale=2**-20)
    between = lines.of("between_nodes_bytes", "between nodes", 8, scale=2**-20)
    return [
        lines.chart("Tokens per second", "all ranks together", tokens, from_zero=True),
        lines.chart("Model FLOP utilisation", _peak(lines.run), mfu, from_zero=True)
        or lines.chart("Arithmetic", "model TFLOP/s per rank", tflops, from_zero=True),
        lines.chart_unless_zero(
            "Exchanged between ranks", "MiB per step, all ranks", sent, between
        ),
    ]


def _uplinks(run: Run) -> list[dict[str, str]]:
    """What each node sent to others in the last step, the busiest first."""
    sent_N = run.last_train.get("between_nodes_bytes_by_node") or []
    names = run.starts[-1].get("nodes", []) if run.starts else []
    mean = sum(sent_N) / max(1, len(sent_N))
    order = sorted(range(len(sent_N)), key=lambda node: -sent_N[node])
    return [
        {
            "node": names[node] if len(names) == len(sent_N) else str(node),
            "sent": number(sent_N[node] / 2**20, ".2f"),
            "over_mean": number(sent_N[node] / mean if mean else None, ".3f"),
        }
        for node in order[:_MOST_NODES]
    ]


def _compression(lines: Lines) -> list[Chart | None]:
    rows = lines.of("codec_rows", "rows", 1, scale=100)
    ratio = lines.of("compression_ratio", "ratio", 3)
    return [
        lines.chart_unless_zero("Compression ratio", "plain bytes over those sent", ratio),
        lines.chart_unless_zero("Rows that travel", "% of the slots that they are of", rows),
        lines.of_evals(
            "Error of compression",
            "of an MoE layer's output, relative, mean over layers",
            "codec_error",
        ),
    ]


def _compressed_layers(run: Run) -> list[dict[str, str]]:
    """A row for each MoE layer, if any says that its rows are compressed."""
    rows = run.last_train.get("codec_rows_by_layer") or []
    errors = run.last_eval.get("codec_error_by_layer") or []
    chosen = run.codec_choice.get("codec_by_layer") or []
    return [
        {
            "layer": str(layer),
            "codec": chosen[layer] if layer < len(chosen) else NONE,
            "rows": number(100 * rows[layer], ".1f") if layer < len(rows) else NONE,
            "error": item(errors, layer, ".4f"),
        }
        for layer in range(max(len(rows), len(errors), len(chosen)))
    ]


def _peak(run: Run) -> str:
    start = run.starts[-1] if run.starts else {}
    return f"% of {number(start.get('peak_tflops'), '.3g')} TFLOP/s per rank: {start.get('peak_source', NONE)}"


def _sources(lines: Lines) -> list[Chart | None]:
    losses, weights = lines.run.loss_by_source.series(), lines.run.weight_by_source.series(100.0)
    if not weights:
        return []
    return [
        lines.chart("Validation loss by source", "nats per token", *losses),
        lines.chart("Weights", "% of the samples read", *weights, from_zero=True),
        lines.of_evals(
            "Divergence of the sources",
            "bits, of the loads that they give experts, mean over layers; 0 = alike",
            "source_divergence",
        ),
    ]


def _layers(run: Run) -> list[dict[str, Any]]:
    """A row for each MoE layer: what the last step and the last evaluation say of it."""
    if run.loads is None:
        return []
    last, told = run.last_train, run.last_eval
    dropped, entropies = last.get("dropped_slots_by_layer"), last.get("router_entropy_by_layer")
    similarities = told.get("expert_similarity_by_layer")
    divergences = told.get("source_divergence_by_layer")

    return [
        {
            "layer": layer,
            "load": f"{np.nanmax(load_E):.2f}",
            "entropy": item(entropies, layer, ".3f"),
            "dropped": item(dropped, layer, ",.0f"),
            "similarity": item(similarities, layer, ".4f"),
            "divergence": item(divergences, layer, ".4f"),
        }
        for layer, load_E in enumerate(run.loads.final_LE)
    ]


def _documents(run: Run) -> list[Chart | None]:
    sources = run.manifest.get("sources")
    if not isinstance(sources, dict):
        return [_lengths("Document lengths", run.manifest)]
    return [_lengths(f"Document lengths, {name}", manifest) for name, manifest in sources.items()]


def _lengths(title: str, manifest: dict[str, Any]) -> Chart | None:
    histogram = manifest
    for key in ("splits", "train", "length_histogram"):
        histogram = histogram.get(key) or {}
    edges, documents = histogram.get("edges_tokens", []), histogram.get("documents", [])
    # The last edge only closes the last bar, where it is given at all.
    labels = [str(edge) if edge < 100_000 else short(edge) for edge in edges[: len(documents)]]
    if len(labels) < len(documents):
        return None
    return bar_chart(title, "documents, by tokens from the edge named", labels, documents)
