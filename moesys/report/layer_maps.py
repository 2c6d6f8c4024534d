"""Pictures of a number of each expert over time, one per MoE layer.

Shapes: S bins of steps, E experts of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesys.report.expert_values import ExpertValues
from moesys.report.heatmap import Scale

AtEnd = Callable[[NDArray[np.float64]], str]
"""From a layer's last values (float64 [E]) to what they are, in words."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A picture with a word at each end of its two axes."""

    title: str
    alt: str
    uri: str
    height_px: int
    top: str
    bottom: str
    left: str
    right: str


def layer_maps(values: ExpertValues, scale: Scale, what: str, at_end: AtEnd) -> list[HeatMap]:
    """Steps across, experts down; `what` is the number, as in "load of 8 experts"."""
    return [_map(values, layer, scale, what, at_end) for layer in range(len(values.final_LE))]


def _map(values: ExpertValues, layer: int, scale: Scale, what: str, at_end: AtEnd) -> HeatMap:
    own_E = ~np.isnan(values.final_LE[layer])
    value_ES, final_E = values.binned_SLE[:, layer, own_E].T, values.final_LE[layer, own_E]
    num_experts = len(final_E)
    return HeatMap(
        title=f"MoE layer {layer}",
        alt=f"MoE layer {layer}, {what} of {num_experts} experts from step {values.first_step} to "
        f"{values.final_step}. At the end {at_end(final_E)}.",
        uri=scale.png_data_uri(value_ES),
        height_px=min(190, max(90, num_experts * 6)),
        top="expert 0",
        bottom=f"{num_experts - 1}",
        left=f"step {values.first_step:,}",
        right=f"{values.final_step:,}",
    )
