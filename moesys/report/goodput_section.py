"""The report's section on goodput: the wall time as one bar, its parts, the split of a start, and stragglers."""

from typing import Any

from moesys.report.goodput import PARTS, goodput_lines
from moesys.report.numbers import duration
from moesys.report.run import Run

_KEYS = {
    "productive": "c3",
    "repeated": "c2",
    "down": "c8",
    "queue": "c7",
    "start_up": "c6",
    "load": "c4",
    "checkpoint": "c1",
    "evaluation": "c5",
    "data": "c6 pale",
    "hang": "c2 pale",
    "other": "c7 pale",
}
"""The page has eight colours; three parts are paler ones."""
_MOST_STRAGGLERS = 50


def goodput_content(run: Run) -> dict[str, Any] | None:
    """What the template shows; None for a run whose records tell no time."""
    ledger = run.ledger
    if not ledger.wall_ms:
        return None
    rows = [
        {
            "part": part.replace("_", "-"),
            "key": _KEYS[part],
            "time": duration(ms / 1e3),
            "percent": f"{100 * ms / ledger.wall_ms:.1f}",
            "width": f"{100 * ms / ledger.wall_ms:.3f}",
            "about": PARTS[part],
        }
        for part, ms in ledger.parts_ms.items()
        if ms
    ]
    split = [
        f"{part.replace('_', ' ')} {duration(seconds / ledger.starts)}"
        for part, seconds in ledger.start_up_s.items()
        if seconds
    ]
    return {
        "summary": goodput_lines(ledger.as_dict())[0],
        "rows": rows,
        "start": ", ".join(split),
        "stragglers": run.stragglers[-_MOST_STRAGGLERS:],
        "unshown_stragglers": max(0, len(run.stragglers) - _MOST_STRAGGLERS),
    }
