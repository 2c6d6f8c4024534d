"""Pictures of which expert got how many tokens: one per MoE layer over time, and the last step's matrix.

Shapes: L MoE layers, E experts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesys.report.expert_values import ExpertValues
from moesys.report.heatmap import OVER_MEAN
from moesys.report.layer_maps import HeatMap, layer_maps

# Up to here the last step's matrix is a table of numbers; beyond it is a picture.
_WRITTEN_EXPERTS = 16
_WRITTEN_LAYERS = 24


@dataclass(frozen=True, kw_only=True)
class LoadMaps:
    """All pictures of a run's expert load, on one colour scale."""

    layers: list[HeatMap]
    final: HeatMap
    final_cells: list[list[tuple[float, str, str]]] | None
    """The last step's matrix as (load / mean, background, ink) of each layer's experts, where it is small enough to read."""
    gradient: str
    """The scale's colours, from 1 / end to end, as a CSS gradient."""
    end: float
    stride: int


def load_maps(loads: ExpertValues) -> LoadMaps:
    """Draw `loads`."""
    num_layers, num_experts = loads.final_LE.shape
    small = num_experts <= _WRITTEN_EXPERTS and num_layers <= _WRITTEN_LAYERS
    cells = [
        [(value, *OVER_MEAN.cell_colours(value)) for value in row_E[~np.isnan(row_E)].tolist()]
        for row_E in loads.final_LE
    ]
    return LoadMaps(
        layers=layer_maps(loads, OVER_MEAN, "load", _fullest),
        final=_final(loads),
        final_cells=cells if small else None,
        gradient=OVER_MEAN.gradient,
        end=OVER_MEAN.high,
        stride=loads.stride,
    )


def _fullest(load_E: NDArray[np.float64]) -> str:
    fullest = int(load_E.argmax())
    return (
        f"expert {fullest} is the fullest with {load_E[fullest]:.2f} times the mean; "
        f"the emptiest has {load_E.min():.2f}"
    )


def _final(loads: ExpertValues) -> HeatMap:
    num_layers, num_experts = loads.final_LE.shape
    fullest_L = np.nanmax(loads.final_LE, axis=1)
    return HeatMap(
        title=f"All layers at step {loads.final_step:,}",
        alt=f"Load of {num_experts} experts (across) in {num_layers} MoE layers (down) at step "
        f"{loads.final_step}. The most uneven is layer {int(fullest_L.argmax())} with "
        f"{fullest_L.max():.2f} times the mean on one expert.",
        uri=OVER_MEAN.png_data_uri(loads.final_LE),
        height_px=min(420, max(44, num_layers * 22)),
        top="layer 0",
        bottom=f"{num_layers - 1}",
        left="expert 0",
        right=f"{num_experts - 1}",
    )
