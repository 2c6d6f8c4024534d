"""Every router that learns, and one balance loss counted over more and more, trained on the same data with equal active FLOPs; and
how many comparisons with other people's routers pass.

The runs are `moesys sweep`'s, kept in runs/routers.sweep and runs/balance.sweep: what is done is not done again. Tables and
pictures go to docs/routers.md.
"""

import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, ROOT, Result, check_parts, rows_of_before
from benchmarks.swept import kept_folder, sweep, variants_of

DESCRIPTION = "validation loss, load and step time of routers and balance levels; oracles passed"
RESULT = "routers"
SEEDS = 3
SWEEPS = {"routers": "router", "balance": "balance counted over"}
"""Files of benchmarks/sweeps, and what a row of each is."""
MICRO, GLOBAL = "1 sequence", "32 sequences (global)"
"""Rows of the balance sweep."""
PICTURES = ROOT / "docs"
QUICK = ["train.steps=4", "train.eval_tokens=4096", "schedule.warmup_steps=2"]


def run(
    quick: bool,
    progress: Callable[[str], None],
    seeds: int = SEEDS,
    only: Sequence[str] = tuple(SWEEPS),
) -> Result:
    """About three hours on two cores, of which the sweep `routers` takes 1.7; quick: two or three rows of each for a few steps.

    With `only` one sweep, the rows of the other are those of the result that is there.
    """
    check_parts(only, SWEEPS)
    progress("oracles")
    oracles = _oracles()
    is_whole = seeds >= SEEDS and not quick
    others = [column for name, column in SWEEPS.items() if name not in only]
    rows, sources = rows_of_before(RESULTS / f"{RESULT}.json", [] if quick else others)
    for name in only:
        lines = _sweep(name, 1 if quick else seeds, quick, progress)
        rows += [_row(SWEEPS[name], line) for line in lines]
        if is_whole:
            shutil.copyfile(kept_folder(name) / "table.svg", PICTURES / f"{name}_compared.svg")
    headline: dict[str, float] = {
        "routers": len(list((ROOT / "configs" / "router").glob("*.yaml"))),
        "router_oracles_passed": oracles["passed"],
    }
    if any(SWEEPS["balance"] in row for row in rows):
        headline["global_minus_micro_val_loss"] = difference(rows)
    return Result(headline=headline, rows=[*rows, oracles], is_whole=is_whole, sources=sources)


def difference(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean validation loss of the loss counted over a step less that of one counted over a sequence, nats; below 0 = global
    is better, as 2501.11873 has it. Pure."""
    losses = {row.get(SWEEPS["balance"]): row["val_loss"] for row in rows if "val_loss" in row}
    return losses[GLOBAL] - losses[MICRO]


def _row(what: str, line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        what: line["row"],
        "runs": line["runs"],
        "val_loss": round(line["val_loss"], 4),
        "val_loss_sd": None if line["val_loss_sd"] is None else round(line["val_loss_sd"], 4),
        "max_mean_load": round(line["load_imbalance"], 3),
        "step_ms": round(line["step_ms"], 1),
        "step_ratio": round(line["step_ratio"], 3),
    }


def _sweep(
    name: str, seeds: int, quick: bool, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The lines of its table."""
    variants, words = variants_of(name), ["experiment=compare"]
    if not quick:
        return sweep(variants, words, seeds, kept_folder(name), progress)
    few = dict(list(variants.items())[:2]) | {
        row: variants[row] for row in (MICRO, GLOBAL) if row in variants
    }
    with tempfile.TemporaryDirectory() as scratch:
        return sweep(few, [*words, *QUICK], seeds, Path(scratch, f"{name}.sweep"), progress)


def _oracles() -> dict[str, int]:
    """Comparisons with other people's routers. Raises ValueError where pytest does not come to them."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        words = ["-q", f"--junitxml={report}", "tests/oracles/test_routers.py"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        if not report.exists():
            raise ValueError(f"the oracles did not run: {(done.stdout + done.stderr)[-500:]}")
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "oracle tests": count["tests"],
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
    }
