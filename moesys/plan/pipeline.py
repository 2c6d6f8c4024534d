"""Which layers make up which pipeline stage, and which rank runs which stage. Pure.

Shapes: S stages, L layers.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

ScheduleName = Literal[
    "gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev"
]

V_SHAPED: frozenset[str] = frozenset({"zbv", "dualpipev"})
"""Schedules in which rank r runs stages r and S-1-r, so that the first rank also runs the last stage."""
LOOPED: frozenset[str] = frozenset({"interleaved", "interleaved_zero_bubble"})
"""Schedules in which rank r runs stages r, r + pp, r + 2 pp, ..."""


def stages_per_rank(schedule: str, virtual_stages: int) -> int:
    """How many stages a rank runs: two in a V, `virtual_stages` in a loop, else one."""
    if schedule in V_SHAPED:
        return 2
    return virtual_stages if schedule in LOOPED else 1


def stages_of_rank(schedule: str, pp_rank: int, pp: int, virtual_stages: int) -> list[int]:
    """The stages that a rank runs, first to last."""
    if schedule in V_SHAPED:
        return [pp_rank, 2 * pp - 1 - pp_rank]
    return [pp_rank + pp * i for i in range(stages_per_rank(schedule, virtual_stages))]


def split_layers(
    layer_costs: Sequence[float],
    num_stages: int,
    *,
    first_cost: float = 0.0,
    last_cost: float = 0.0,
) -> list[list[int]]:
    """Cut layers into `num_stages` runs so that the costliest stage, which sets the pace, costs least.

    `first_cost` is the embedding's, `last_cost` the head's: they come on top of the first and the last stage. Among the
    best cuts, the one whose costs are most even (least sum of squares). Every stage has a layer. O(S L^2).

    Raises:
        ValueError: fewer layers than stages.
    """
    num_layers = len(layer_costs)
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot make {num_stages} pipeline stages")
    ends = [0.0, *accumulate(layer_costs)]

    def cost_of(stage: int, start: int, stop: int) -> float:
        extra = (first_cost if stage == 0 else 0.0) + (
            last_cost if stage == num_stages - 1 else 0.0
        )
        return ends[stop] - ends[start] + extra

    # best[stop] = (costliest stage, sum of squares, starts) of the first stages over layers 0..stop-1.
    best = {0: (0.0, 0.0, ())}
    for stage in range(num_stages):
        reached: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        layers_left = num_stages - stage - 1
        for stop in range(stage + 1, num_layers - layers_left + 1):
            options = [
                (
                    max(worst, cost_of(stage, start, stop)),
                    squares + cost_of(stage, start, stop) ** 2,
                    (*starts, start),
                )
                for start, (worst, squares, starts) in best.items()
                if start < stop
            ]
            reached[stop] = min(options)
        best = reached
    starts = [*best[num_layers][2], num_layers]
    return [list(range(starts[i], starts[i + 1])) for i in range(num_stages)]
