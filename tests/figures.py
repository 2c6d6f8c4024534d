"""Figures that suites find out, for `moesys bench parallel` and its page.

    count("bit_flips_found", 40)                    # added up over all tests
    worst("activation_formula_error_pct", 0.3)      # the largest one stays

With MOESYS_FIGURES=FILE each is a line appended to FILE (so that any number of processes may write); without it nothing
happens. `make parity` sets it.
"""

import json
import os
from pathlib import Path


def count(name: str, amount: float = 1) -> None:
    """Add to a figure."""
    _append("count", name, amount)


def worst(name: str, value: float) -> None:
    """Raise a figure to `value`, if it is lower."""
    _append("worst", name, value)


def read_figures(path: Path) -> dict[str, float]:
    """All figures in the file; none if there is no file."""
    if not path.exists():
        return {}
    figures: dict[str, float] = {}
    for line in path.read_text().splitlines():
        rule, name, value = json.loads(line)
        if name not in figures:
            figures[name] = float(value)
        else:
            figures[name] = figures[name] + value if rule == "count" else max(figures[name], value)
    return figures


def _append(rule: str, name: str, value: float) -> None:
    if path := os.environ.get("MOESYS_FIGURES"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps([rule, name, float(value)]) + "\n")
