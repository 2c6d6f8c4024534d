"""What fewer rows and fewer bits cost in validation loss, from sweeps of whole runs.

`ratio`: a small model and every ratio of rows, with and without compensation. `loss`: quickstart, with what the clusters' variants
train with, and after how many steps each is at the same loss.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Cell
from benchmarks.swept import Variants, records_of, run_folders, sweep

PLAIN = "none"
RATIO_WORDS = ["experiment=compare", "train.steps=240"]
LOSS_WORDS = ["experiment=quickstart", "train.eval_every_steps=20", "train.eval_tokens=65536"]
"""As many tokens per rank and micro-step as the ranks of the emulated cluster have: rows are the same."""

Curve = Sequence[tuple[int, float]]
"""Steps done and the validation loss then."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run says of itself."""

    curve: Curve
    rows_pct: float
    """Of the slots, mean over steps."""
    sent_bytes: float
    """Per step, mean."""
    layer_error: float
    """Of the outputs of MoE layers, at the end; 0 without compression."""

    @property
    def val_loss(self) -> float:
        return self.curve[-1][1]


def trained(records: Sequence[Mapping[str, Any]]) -> Trained:
    """Pure."""
    steps = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    return Trained(
        curve=[(record["step"], record["val_loss"]) for record in evals],
        rows_pct=100 * statistics.mean(record.get("codec_rows", 1.0) for record in steps),
        sent_bytes=statistics.mean(record["sent_bytes"] for record in steps),
        layer_error=evals[-1].get("codec_error", 0.0),
    )


def train_all(
    variants: Variants,
    words: Sequence[str],
    seeds: int,
    folder: Path,
    progress: Callable[[str], None],
) -> dict[str, list[Trained]]:
    """By variant, the runs of all seeds."""
    sweep(variants, words, seeds, folder, progress)
    return {
        name: [trained(records_of(run_dir)) for run_dir in run_dirs]
        for name, run_dirs in run_folders(variants, seeds, folder).items()
    }


def ratio_rows(found: Mapping[str, Sequence[Trained]]) -> list[dict[str, Cell]]:
    """A row for each variant: means over seeds. Pure."""
    return [
        {
            "codec, error bound": name,
            "runs": len(runs),
            "rows_pct": round(statistics.mean(run.rows_pct for run in runs), 2),
            "bytes_pct": round(100 * _bytes_ratio(runs, found[PLAIN]), 2),
            "layer_error": round(statistics.mean(run.layer_error for run in runs), 4),
            **_losses(runs, found[PLAIN]),
        }
        for name, runs in found.items()
    ]


def loss_rows(found: Mapping[str, Sequence[Trained]]) -> list[dict[str, Cell]]:
    """And at what loss both it and the plain runs with the same seeds were, after how many steps each. Pure."""
    rows = []
    for name, runs in found.items():
        same_seeds = found[PLAIN][: len(runs)]
        plain = mean_curve([run.curve for run in same_seeds])
        curve = mean_curve([run.curve for run in runs])
        both = max(curve[-1][1], plain[-1][1])
        steps, plain_steps = steps_to(curve, both), steps_to(plain, both)
        rows.append(
            {
                "trained with": name,
                "runs": len(runs),
                "rows_pct": round(statistics.mean(run.rows_pct for run in runs), 2),
                **_losses(runs, same_seeds),
                "same_loss": round(both, 4),
                "steps": round(steps, 1),
                "plain_steps": round(plain_steps, 1),
                "steps_ratio": round(steps / plain_steps, 4),
            }
        )
    return rows


def _losses(runs: Sequence[Trained], plain: Sequence[Trained]) -> dict[str, Cell]:
    """The gap is to the plain run with the same seed; seeds move both."""
    gaps_pct = [
        100 * (run.val_loss / base.val_loss - 1) for run, base in zip(runs, plain, strict=True)
    ]
    return {
        "val_loss": round(statistics.mean(run.val_loss for run in runs), 4),
        "gap_pct": round(statistics.mean(gaps_pct), 3),
        "gap_sd": round(statistics.stdev(gaps_pct), 3) if len(runs) > 1 else None,
    }


def _bytes_ratio(runs: Sequence[Trained], plain: Sequence[Trained]) -> float:
    return statistics.mean(a.sent_bytes / b.sent_bytes for a, b in zip(runs, plain, strict=True))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Over runs that were evaluated after the same steps. Pure."""
    return [
        (points[0][0], statistics.mean(loss for _, loss in points))
        for points in zip(*curves, strict=True)
    ]


def steps_to(curve: Curve, loss: float) -> float:
    """After how many steps it is first at most `loss`, between two evaluations by a straight line. Pure.

    Raises:
        ValueError: it never is.
    """
    before: tuple[int, float] | None = None
    for step, here in curve:
        if here <= loss:
            if before is None or before[1] == here:
                return float(step)
            share = (before[1] - loss) / (before[1] - here)
            return before[0] + share * (step - before[0])
        before = step, here
    raise ValueError(f"the loss is never {loss}")
