"""The figures a run is judged by: what `moesys report --json` prints and the page's tiles show."""

import math
from typing import Any

import numpy as np

from moesys.report.numbers import is_number
from moesys.report.run import PARTS, Run

_WARM_UP_SHARE = 0.1


def figures(run: Run) -> dict[str, Any]:
    """Plain numbers with their unit in the name; null where the run folder does not say.

    What summary.json states is taken from there, the rest from metrics.jsonl. Rates without a summary are
    medians over the steps after the first tenth, so that compiling and warm-up do not count.
    """
    start = run.starts[-1] if run.starts else {}
    last, summary = run.last_train, run.summary

    def said(name: str, *fallbacks: Any) -> Any:
        return next((value for value in (summary.get(name), *fallbacks) if value is not None), None)

    state = status(run)
    imbalance, imbalance_step = run.peaks.get("max_load_imbalance", (None, None))
    return {
        "name": run.name,
        "status": state,
        "step": said("steps", last.get("step", 0))
        if status(run) == summary.get("status")
        else last.get("step", 0),
        "steps": start.get("steps"),
        "tokens": last.get("tokens"),
        "loss": last.get("loss"),
        "bits_per_byte": last.get("bits_per_byte"),
        "val_loss": said("val_loss", run.last_eval.get("val_loss")),
        "val_bits_per_byte": said("val_bits_per_byte", run.last_eval.get("val_bits_per_byte")),
        "unigram_bits_per_byte": said(
            "unigram_bits_per_byte", run.manifest.get("unigram_bits_per_byte")
        ),
        "tokens_per_s": said("tokens_per_s", _steady(run, "tokens_per_s")),
        "tflops_per_rank": said("tflops_per_rank", _steady(run, "tflops_per_rank")),
        "mfu": said("mfu", _steady(run, "mfu")),
        "peak_tflops": start.get("peak_tflops"),
        "wall_s": said("wall_s", run.seconds),
        "world_size": said("world_size", start.get("world_size")),
        "parameters": said("parameters", start.get("parameters")),
        "active_parameters": said("active_parameters", start.get("active_parameters")),
        "load_imbalance": last.get("load_imbalance"),
        "worst_load_imbalance": imbalance,
        "worst_load_imbalance_step": imbalance_step,
        "dead_experts": last.get("dead_experts"),
        "dropped_slots": run.totals["dropped_slots"],
        "sent_bytes": run.totals["sent_bytes"],
        "between_nodes_bytes": run.totals["between_nodes_bytes"],
        "step_time_ms": time_split(run),
        "exchange_ms": run.totals["exchange_ms"],
        "eval_ms": run.totals["eval_ms"],
        "checkpoint_ms": run.totals["checkpoint_ms"],
        "recorded_steps": run.num_steps,
        "restarts": max(0, len(run.starts) - 1),
        "checkpoints": run.num_checkpoints,
        "anomalies": run.num_anomalies,
        "goodput": run.ledger.as_dict(),
        "stragglers": run.stragglers,
    }


def status(run: Run) -> str:
    """summary.json's word if it is about the end of this metrics.jsonl, else what the records say."""
    if run.ended:
        return str(
            run.summary.get("status")
            or f"stopped: {run.stops[-1].get('reason', 'no reason given')}"
        )
    return "in progress (or killed: no stop record)"


def time_split(run: Run) -> dict[str, float]:
    """Milliseconds over all recorded steps by part, with `other` = the rest of step_ms; parts of 0 are left out."""
    split = {part: run.totals[f"{part}_ms"] for part in PARTS}
    split["other"] = max(0.0, run.totals["step_ms"] - sum(split.values()))
    return {part: ms for part, ms in split.items() if ms > 0}


def _steady(run: Run, column: str) -> float | None:
    values = run.column(column)
    values = values[math.floor(len(values) * _WARM_UP_SHARE) :]
    values = values[np.isfinite(values)]
    median = float(np.median(values)) if len(values) else None
    return median if is_number(median) else None
