"""What copies of experts did in a step: for its record.

Shapes: M MoE layers of all pipeline stages, E experts of the layer, P ranks of an expert group.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PlacementFigures:
    """What copies did in a step, over all ranks."""

    holders_ME: list[list[int]]
    """Ranks of a group of parallel.ep that held each expert; [] where that is decided within the step."""
    busiest_rank_M: list[float]
    """Rows of the busiest rank over the mean: 1 = level."""
    busiest_owner_M: list[float]
    """The same, had owners served all rows."""
    prediction_error_M: list[float]
    """Share of a layer's rows that went to other experts than the plan in force was made for; [] where nothing was predicted."""
    sent_bytes: int
    """Parameters and gradients for copies, that ranks sent."""
    between_nodes_bytes: int
    moved_experts: int
    """Of all layers, that have another owner since the step before."""
    reshard_bytes: int
    """Parameters and optimizer states that ranks sent with these."""
    wait_ms: float
    """For copies and their gradients, mean over ranks; part of forward, backward and optimizer."""
    added_copies: int | None
    """Of all groups and layers, beside the planned ones, once true loads were known; None where that is not asked for."""
    overlap_degree: int | None
    """That the plan in force was made by; None where it is not to be measured."""
    speeds_P: list[float] | None
    """Of the ranks of a group, 1 = mean, by which rows were shared out; None where they are not to be measured."""
