"""Which experts each source of text prefers, in pictures.

Shapes: N sources, L MoE layers, E experts (NaN where a layer has fewer than another).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesys.report.heatmap import OVER_MEAN
from moesys.report.layer_maps import HeatMap


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Pictures of the last evaluation: one for each source, layers down and experts across."""

    maps: list[HeatMap]
    step: int
    gradient: str
    end: float


def preferences(last_eval: Mapping[str, Any]) -> Preferences | None:
    """None where the evaluation had no two sources, or the model has no experts."""
    loads = last_eval.get("load_by_source") or {}
    if len(loads) < 2 or not all(loads.values()):
        return None
    relative_NLE = relative_shares([*loads.values()])
    return Preferences(
        maps=[_map(name, of_LE) for name, of_LE in zip(loads, relative_NLE, strict=True)],
        step=last_eval["step"],
        gradient=OVER_MEAN.gradient,
        end=OVER_MEAN.high,
    )


def relative_shares(loads: list[list[list[int]]]) -> NDArray[np.float64]:
    """Share of a source's slots that an expert gets, over the mean of that of all sources: float64 [N, L, E].

    1 = no preference, N = this source alone uses the expert; NaN where no source does.
    """
    widest = max(len(load_E) for of_source in loads for load_E in of_source)
    load_NLE = np.full((len(loads), len(loads[0]), widest), np.nan)
    for n, of_source in enumerate(loads):
        for layer, load_E in enumerate(of_source):
            load_NLE[n, layer, : len(load_E)] = load_E
    total_NL1 = np.nansum(load_NLE, axis=2, keepdims=True)
    share_NLE = load_NLE / np.maximum(total_NL1, 1)
    mean_LE = share_NLE.mean(axis=0)
    return np.divide(share_NLE, mean_LE, out=np.full_like(share_NLE, np.nan), where=mean_LE > 0)


def _map(name: str, relative_LE: NDArray[np.float64]) -> HeatMap:
    num_layers, num_experts = relative_LE.shape
    layer, expert = np.unravel_index(int(np.nanargmax(relative_LE)), relative_LE.shape)
    return HeatMap(
        title=name,
        alt=f"{name}: how much of its text goes to each of {num_experts} experts (across) in {num_layers} MoE layers "
        f"(down), over the mean of all sources. Its strongest preference is expert {expert} in layer {layer}, "
        f"{relative_LE[layer, expert]:.2f} times the mean.",
        uri=OVER_MEAN.png_data_uri(relative_LE),
        height_px=min(420, max(44, num_layers * 22)),
        top="layer 0",
        bottom=f"{num_layers - 1}",
        left="expert 0",
        right=f"{num_experts - 1}",
    )
