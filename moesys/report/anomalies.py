"""Anomalies of a run in words, from their records."""

from collections.abc import Mapping
from typing import Any

from moesys.report.numbers import number

_ACTIONS = {
    "skip": "gradients dropped",
    "reinject": "gradients dropped, the batch comes later",
    "lower_rate": "learning rate lowered",
    "stop": "the run ends",
}


def anomaly_line(record: Mapping[str, Any]) -> str:
    """What was found and what was done, e.g. "loss spikes (loss 9.1, grad_norm 3, limit 6.2): gradients dropped"."""
    found = [f"{name} {number(record.get(name), '.4g')}" for name in ("loss", "grad_norm")]
    if record.get("limit") is not None:
        found.append(f"limit {number(record['limit'], '.4g')}")
    action = record.get("action")
    done = _ACTIONS.get(str(action), f"rolled back to step {record.get('to_step', 0):,}")
    return f"{record.get('reason')} ({', '.join(found)}): {done}"
