"""One self-contained HTML page about a run: no network, no external file, bounded size."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml

from moesys.report.anomalies import anomaly_line
from moesys.report.figures import figures
from moesys.report.lines import marks
from moesys.report.numbers import NONE, duration, is_number, moment, number, short, size
from moesys.report.records import time_of
from moesys.report.run import Run
from moesys.report.sections import Section, chart_sections
from moesys.report.style import SCRIPT, STYLE
from moesys.report.template import TEMPLATE


@dataclass(frozen=True, kw_only=True)
class Tile:
    label: str
    value: str
    detail: str = ""


def render(run: Run) -> str:
    """The page as HTML. Sections for which the run has no data are left out."""
    facts = figures(run)
    tables = (_history(run), _configuration(run), _environment(run))
    sections = [
        *chart_sections(run, unigram_bits_per_byte=facts["unigram_bits_per_byte"]),
        *(table for table in tables if table.content),
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.from_string(TEMPLATE).render(
        run=run,
        facts=facts,
        lead=_lead(run, facts),
        tiles=_tiles(run, facts),
        sections=sections,
        marks=sorted({mark.kind for mark in marks(run)}),
        style=STYLE,
        script=SCRIPT,
    )


def _lead(run: Run, facts: Mapping[str, Any]) -> str:
    start = _last_start(run)
    words = [
        f"step {facts['step']:,} of {number(facts['steps'], ',')}",
        f"{_ranks(start['world_size'])} (dp {start['dp']}, ep {start['ep']})",
        f"{start['device']}, {start['dtype']}, {start['backend']}",
        f"experts: {start['expert_backend']}",
        f"last record {moment(run.last_unix_s)}",
    ]
    return " · ".join(words)


def _tiles(run: Run, facts: Mapping[str, Any]) -> list[Tile]:
    split = "val" if is_number(facts["val_bits_per_byte"]) else "train"
    bits = facts["val_bits_per_byte"] if split == "val" else facts["bits_per_byte"]
    unigram, peak = facts["unigram_bits_per_byte"], facts["peak_tflops"]
    worst, worst_step = facts["worst_load_imbalance"], facts["worst_load_imbalance_step"]
    return [
        Tile(
            label={"val": "validation bits/byte", "train": "training bits/byte"}[split],
            value=number(bits, ".4f"),
            detail=f"unigram entropy {unigram:.4f}" if is_number(unigram) else "",
        ),
        Tile(
            label="tokens/s",
            value=short(facts["tokens_per_s"]),
            detail=f"{short(facts['tokens'])} tokens seen",
        ),
        Tile(
            label="MFU",
            value=number(facts["mfu"], ".1%"),
            detail=f"of {peak:.3g} TFLOP/s per rank" if is_number(peak) else "peak not known",
        ),
        Tile(
            label="parameters",
            value=short(facts["parameters"]),
            detail=f"{short(facts['active_parameters'])} active per token",
        ),
        Tile(
            label="wall time",
            value=duration(facts["wall_s"]),
            detail=_restarts(facts["restarts"]),
        ),
        Tile(
            label="goodput",
            value=number(run.ledger.goodput_pct / 100, ".1%") if run.ledger.wall_ms else NONE,
            detail=f"{run.ledger.steps_lost:,} steps lost",
        ),
        Tile(
            label="load imbalance",
            value=number(facts["load_imbalance"], ".2f"),
            detail=f"worst layer so far {worst:.2f} at step {worst_step:,}" if worst else "",
        ),
    ]


def _last_start(run: Run) -> Mapping[str, Any]:
    return defaultdict(lambda: NONE, run.starts[-1] if run.starts else {})


def _ranks(world_size: Any) -> str:
    return "1 rank" if world_size == 1 else f"{world_size} ranks"


def _restarts(count: int) -> str:
    return {0: "in one go", 1: "restarted once"}.get(count, f"restarted {count} times")


def _history(run: Run) -> Section:
    rows = [
        {
            "when": moment(at) if (at := time_of(event)) is not None else "",
            "step": event.get("resumed_from_step" if event["kind"] == "start" else "step") or 0,
            **_told(event),
        }
        for event in run.events
    ]
    shown = Counter(event["kind"] for event in run.events)
    unshown = {
        "checkpoints": run.num_checkpoints - shown["checkpoint"],
        "anomalies": run.num_anomalies - shown["anomaly"],
    }
    content = {"rows": rows, "unshown": unshown} if rows else None
    return Section(id="history", title="History", content=content)


def _told(event: Mapping[str, Any]) -> dict[str, str]:
    if event["kind"] == "start":
        ranks = f"{_ranks(event.get('world_size', NONE))}, {event.get('device', NONE)}"
        return {
            "what": "resumed" if event.get("resumed_from_step") else "started",
            "detail": "; ".join([ranks, *map(str, event.get("notes") or ())]),
        }
    if event["kind"] == "anomaly":
        return {"what": "anomaly", "detail": anomaly_line(event)}
    if event["kind"] == "stop":
        return {"what": "ended", "detail": str(event.get("reason", ""))}
    ms = event.get("checkpoint_ms")
    took = duration(ms / 1e3) if ms is not None else NONE
    return {"what": "checkpoint", "detail": f"{size(event.get('bytes'))} in {took}"}


def _configuration(run: Run) -> Section:
    texts = {
        name: yaml.safe_dump(value, sort_keys=False, width=88).removesuffix("...\n").rstrip()
        for name, value in run.config.items()
    }
    return Section(id="configuration", title="Configuration", content=texts)


def _environment(run: Run) -> Section:
    """What the last start and the summary say, mappings one level deep, lists left out."""
    said = {**run.summary, **(run.starts[-1] if run.starts else {})}
    rows: dict[str, Any] = {}
    for name, value in said.items():
        if isinstance(value, dict):
            rows |= {f"{name}.{inner}": item for inner, item in value.items()}
        elif name != "kind" and not isinstance(value, list):
            rows[name] = value
    return Section(id="environment", title="Environment and summary", content=rows)
