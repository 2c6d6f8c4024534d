"""From finished runs to the table that compares them. Pure."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STEADY_SHARE = 0.5
"""Loads and times are of the last half of the steps."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one run."""

    row: str
    name: str
    val_loss: float
    """Nats per token, after the last step."""
    load_imbalance: float
    """Largest over mean load of an expert, mean over layers and the last half of the steps."""
    step_ms: float
    """Median over the last half of the steps."""


def measured(row: str, name: str, records: Iterable[Mapping[str, Any]]) -> Measured | None:
    """From a run's records; None if it has no evaluation or no step."""
    train, val_loss = [], None
    for record in records:
        if record["kind"] == "train":
            train.append((record["load_imbalance"], record["step_ms"]))
        elif record["kind"] == "eval":
            val_loss = record["val_loss"]
    if not train or val_loss is None:
        return None
    steady = train[int(len(train) * STEADY_SHARE) :]
    return Measured(
        row=row,
        name=name,
        val_loss=val_loss,
        load_imbalance=statistics.mean(load for load, _ in steady),
        step_ms=statistics.median(step_ms for _, step_ms in steady),
    )


def table(runs: Sequence[Measured]) -> list[dict[str, Any]]:
    """A line for each row, in order of appearance: means over seeds, and standard deviations of val_loss.

    `step_ratio` is the mean over seeds of the step time over that of the first row's run of the same place.
    """
    of_row: dict[str, list[Measured]] = {}
    for run in runs:
        of_row.setdefault(run.row, []).append(run)
    first = next(iter(of_row.values()), [])
    lines = []
    for row, found in of_row.items():
        ratios = [run.step_ms / base.step_ms for run, base in zip(found, first, strict=False)]
        losses = [run.val_loss for run in found]
        lines.append(
            {
                "row": row,
                "runs": len(found),
                "val_loss": statistics.mean(losses),
                "val_loss_sd": statistics.stdev(losses) if len(losses) > 1 else None,
                "val_losses": losses,
                "load_imbalance": statistics.mean(run.load_imbalance for run in found),
                "step_ms": statistics.mean(run.step_ms for run in found),
                "step_ratio": statistics.mean(ratios),
            }
        )
    return lines


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("", lambda line: line["row"]),
    ("runs", lambda line: str(line["runs"])),
    ("validation loss", lambda line: f"{line['val_loss']:.4f}"),
    ("sd", lambda line: "-" if line["val_loss_sd"] is None else f"{line['val_loss_sd']:.4f}"),
    ("max/mean load", lambda line: f"{line['load_imbalance']:.2f}"),
    ("step, ms", lambda line: f"{line['step_ms']:.0f}"),
    ("step ratio", lambda line: f"{line['step_ratio']:.2f}"),
)


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    rows = [[head for head, _ in _COLUMNS], ["---"] * len(_COLUMNS)]
    rows += [[cell(line) for _, cell in _COLUMNS] for line in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
