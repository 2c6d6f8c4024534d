"""Which groups of ranks lie on several nodes. Rank r is on node r // ranks_per_node, as torchrun places it."""

from collections.abc import Iterator
from dataclasses import replace

from moesys.config.layout import allowed_degrees, degrees
from moesys.config.schema import RunConfig
from moesys.parallel.dims import ParallelDims, parallel_dims

_TALKATIVE = {"tp": "every layer", "etp": "every MoE layer"}
_EXCHANGING = {
    "cp": "keys and values of attention go",
    "ep": "rows on their way to experts go",
}


def crossing_groups(dims: ParallelDims, axis: str, ranks_per_node: int) -> list[list[int]]:
    """The groups of `axis` with ranks of more than one node."""
    return [
        group
        for group in dims.groups(axis)
        if group[0] // ranks_per_node != group[-1] // ranks_per_node
    ]


def node_warnings(config: RunConfig, world_size: int, ranks_per_node: int) -> Iterator[str]:
    """Of axes whose ranks add up activations in every layer. The layout is one without problems."""
    dims, given = parallel_dims(config.parallel, world_size), degrees(config.parallel)
    for axis, where in _TALKATIVE.items():
        if crossing := crossing_groups(dims, axis, ranks_per_node):
            inside = [
                degree
                for degree in allowed_degrees(config, world_size, axis)
                if degree < given[axis]
                and not crossing_groups(
                    parallel_dims(replace(config.parallel, **{axis: degree}), world_size),
                    axis,
                    ranks_per_node,
                )
            ]
            yield (
                f"parallel.{axis}={given[axis]}: {spell_crossing(dims, axis, ranks_per_node, crossing)}, "
                f"and they add up activations in {where}: use parallel.{axis}={max(inside, default=1)}"
            )


def node_notes(dims: ParallelDims, ranks_per_node: int) -> Iterator[str]:
    """Of axes that exchange rows: slower between nodes, and often meant so."""
    for axis, what in _EXCHANGING.items():
        if crossing := crossing_groups(dims, axis, ranks_per_node):
            yield f"{spell_crossing(dims, axis, ranks_per_node, crossing)}: {what} over the network"


def spell_crossing(
    dims: ParallelDims, axis: str, ranks_per_node: int, crossing: list[list[int]]
) -> str:
    groups = len(dims.groups(axis))
    return (
        f"{len(crossing)} of {groups} {axis} groups (ranks {spell_groups(crossing)}) lie on several "
        f"nodes of {ranks_per_node}"
    )


def spell_groups(groups: list[list[int]], most: int = 4) -> str:
    """ "0-3, 4-7, ..., 28-31"; ranks that are not neighbours "0-24 by 8"."""
    if len(groups) > most:
        first = ", ".join(spell_ranks(group) for group in groups[: most - 2])
        return f"{first}, ..., {spell_ranks(groups[-1])}"
    return ", ".join(spell_ranks(group) for group in groups)


def spell_ranks(ranks: list[int]) -> str:
    """Ranks at equal distances, as those of one axis are."""
    if len(ranks) == 1:
        return str(ranks[0])
    step = ranks[1] - ranks[0]
    assert ranks == list(range(ranks[0], ranks[-1] + 1, step))
    if len(ranks) == 2 and step > 1:
        return f"{ranks[0]}+{ranks[1]}"
    return f"{ranks[0]}-{ranks[-1]}" + (f" by {step}" if step > 1 else "")
