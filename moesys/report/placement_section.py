"""The report's section on copies of experts: how level they made ranks, what they cost, who held them, what was predicted.

Shapes: L MoE layers, E experts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesys.report.chart import Chart
from moesys.report.expert_values import ExpertValues
from moesys.report.heatmap import from_one_to
from moesys.report.layer_maps import HeatMap, layer_maps
from moesys.report.lines import Lines
from moesys.report.numbers import NONE, is_number, item
from moesys.report.run import Run

_MIB = 2**-20


@dataclass(frozen=True, kw_only=True)
class HolderMaps:
    """Pictures of how many ranks held each expert."""

    layers: list[HeatMap]
    gradient: str
    """The scale's colours, from 1 to `ranks`, as a CSS gradient."""
    ranks: int
    """Of a group of parallel.ep."""
    stride: int


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What the template shows."""

    rows: list[dict[str, str]]
    """Of each layer at the last step; empty where it had no copies to tell of."""
    note: str
    maps: HolderMaps | None
    """None where no plan was made before a step."""


def placement_charts(lines: Lines) -> list[Chart | None]:
    """None of them for a run whose experts have one holder each."""
    return [
        lines.chart(
            "Busiest rank",
            "rows / mean over ranks, mean over layers; 1 = level",
            lines.of("owner_imbalance", "had owners served all", 2),
            lines.of("rank_imbalance", "with copies", 3),
        ),
        lines.chart(
            "Load prediction error",
            "% of tokens that went to other experts than predicted, mean over layers",
            lines.of("load_prediction_error", "error", 5, scale=100),
            from_zero=True,
        ),
        lines.chart_unless_zero(
            "Sent for copies",
            "MiB per step, all ranks; parameters to copies, gradients back",
            lines.of("copies_bytes", "sent", 1, scale=_MIB),
            lines.of("copies_between_nodes_bytes", "between nodes", 8, scale=_MIB),
        ),
        lines.chart_unless_zero(
            "Wait for copies",
            "milliseconds per step, mean over ranks",
            lines.of("copies_wait_ms", "wait", 6),
        ),
        lines.chart_unless_zero(
            "Copies added to the planned ones",
            "per step, all layers and groups, once true loads were known",
            lines.of("added_copies", "copies", 7),
        ),
        lines.chart_unless_zero(
            "Experts with a new owner",
            "per step, all layers",
            lines.of("moved_experts", "experts", 4),
        ),
        lines.chart_unless_zero(
            "Sent to new owners",
            "MiB per step, all ranks; parameters and optimizer states",
            lines.of("reshard_bytes", "sent", 4, scale=_MIB),
        ),
    ]


def placement_content(run: Run) -> Placed | None:
    """None for a run whose experts have one holder each."""
    last, held = run.last_train, run.holders
    owners, levelled = last.get("owner_imbalance_by_layer"), last.get("rank_imbalance_by_layer")
    errors = last.get("load_prediction_error_by_layer")
    rows = [
        {
            "layer": str(layer),
            "owners": item(owners, layer, ".3f"),
            "levelled": item(levelled, layer, ".3f"),
            **_holders_fields(held, layer),
            "error": item(errors, layer, ".1%"),
        }
        for layer in range(len(levelled or ()))
    ]
    maps = held and _maps(held, _ranks(run))
    return Placed(rows=rows, note=_note(run), maps=maps) if rows or maps else None


def _maps(held: ExpertValues, ranks: int) -> HolderMaps:
    def at_end(holders_E: NDArray[np.float64]) -> str:
        with_copies, most, expert = _most_held(holders_E)
        if most == 1:
            return "every expert has one holder"
        return (
            f"expert {expert} has the most holders, {most} of {ranks} ranks; "
            f"experts with copies: {with_copies}"
        )

    scale = from_one_to(ranks)
    return HolderMaps(
        layers=layer_maps(held, scale, "holders", at_end),
        gradient=scale.gradient,
        ranks=ranks,
        stride=held.stride,
    )


def _ranks(run: Run) -> int:
    """The most that an expert could have as holders in any start."""
    told = [start.get("ep") for start in run.starts]
    return max((int(ranks) for ranks in told if is_number(ranks)), default=2)


def _holders_fields(held: ExpertValues | None, layer: int) -> dict[str, str]:
    if held is None:
        return {"with_copies": NONE, "most": NONE}
    with_copies, most, expert = _most_held(held.final_LE[layer])
    return {
        "with_copies": str(with_copies),
        "most": f"{most} (expert {expert})" if most > 1 else "1",
    }


def _most_held(holders_E: NDArray[np.float64]) -> tuple[int, int, int]:
    """Experts with copies, the most holders of one, and which one that is."""
    expert = int(np.nanargmax(holders_E))
    return int((holders_E > 1).sum()), int(holders_E[expert]), expert


def _note(run: Run) -> str:
    step: Any = run.last_train.get("step", 0)
    if run.holders is None or run.holders.final_step == step:
        return f"Of step {step:,}.{_speeds(run)}"
    return f"Of step {step:,}; copies and holders of step {run.holders.final_step:,}.{_speeds(run)}"


def _speeds(run: Run) -> str:
    """Nothing where they are not measured."""
    speeds = run.last_train.get("rank_speeds")
    if not speeds:
        return ""
    told = f"{min(speeds):.2f} (rank {speeds.index(min(speeds))}) to {max(speeds):.2f}"
    return f" Rows are over the speeds of a group's ranks, {told} of the mean."
