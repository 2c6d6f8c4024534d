"""`moesys config mesh`: which rank does what, before there is any. Integers only: no torch, no cluster."""

import argparse
import json
from collections.abc import Iterable
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesys.parallel.dims import ParallelDims

_DENSE = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
_EXPERT = ("pp", "edp_replicate", "edp_shard", "ep", "etp")
_COLUMNS = 16
"""Of a grid, at most; a longer axis goes on in the next line."""
_GRIDS = {"tokens and dense parameters": _DENSE, "experts": _EXPERT}


def check_counts(args: argparse.Namespace) -> None:
    for option, count in (
        ("--world-size", args.world_size),
        ("--ranks-per-node", args.ranks_per_node),
    ):
        if count is not None and count < 1:
            raise ValueError(f"{option} {count} must be at least 1")


def run(args: argparse.Namespace) -> int:
    from moesys.config.compose import compose
    from moesys.config.nodes import node_notes
    from moesys.config.validate import validate
    from moesys.parallel.dims import parallel_dims

    check_counts(args)
    world_size = args.world_size
    config = compose(args.overrides, args.config_dir)
    warnings = validate(config, world_size=world_size, ranks_per_node=args.ranks_per_node)
    dims, ranks_per_node = parallel_dims(config.parallel, world_size), args.ranks_per_node
    notes = list(node_notes(dims, ranks_per_node)) if ranks_per_node else []
    if args.json:
        facts = _facts(dims, ranks_per_node) | {"warnings": warnings, "notes": notes}
        print(json.dumps(facts, indent=2))
        return 0
    ranks_per_node = ranks_per_node or world_size
    blocks = [
        _equations(dims),
        *(_grid(dims, title, axes, ranks_per_node) for title, axes in _GRIDS.items()),
        _groups(dims, ranks_per_node),
        _ranks(dims, ranks_per_node),
        [f"warning: {warning}" for warning in warnings],
        [f"note: {note}" for note in notes],
    ]
    print("\n\n".join("\n".join(lines) for lines in blocks if lines))
    return 0


def _facts(dims: "ParallelDims", ranks_per_node: int | None) -> dict[str, Any]:
    from moesys.config.nodes import crossing_groups

    per_node = ranks_per_node or dims.world_size
    sizes = dims.dense_axes | dims.expert_axes
    return {
        "world_size": dims.world_size,
        "ranks_per_node": ranks_per_node,
        "degrees": {"dp": dims.dp, "edp": dims.edp, **sizes},
        "equations": _equations(dims),
        "groups": {axis: dims.groups(axis) for axis in sizes},
        "groups_across_nodes": {axis: crossing_groups(dims, axis, per_node) for axis in sizes},
        "ranks": [
            {"rank": rank, "node": rank // per_node, **dims.coordinates(rank)}
            for rank in range(dims.world_size)
        ],
    }


def _equations(dims: "ParallelDims") -> list[str]:
    return [
        f"world {dims.world_size} = pp {dims.pp} * dp {dims.dp} * cp {dims.cp} * tp {dims.tp}",
        f"stage {dims.stage_size} = dp {dims.dp} * cp {dims.cp} * tp {dims.tp} "
        f"= edp {dims.edp} * ep {dims.ep} * etp {dims.etp}",
        f"dp {dims.dp} = dp_replicate {dims.dp_replicate} * dp_shard {dims.dp_shard}, "
        f"edp {dims.edp} = edp_replicate {dims.edp_replicate} * edp_shard {dims.edp_shard}",
    ]


def _grid(
    dims: "ParallelDims", title: str, axes: tuple[str, ...], ranks_per_node: int
) -> list[str]:
    """The ranks as one of the two grids: the fastest axis across, the others down, `|` between nodes."""
    used = _used(dims, axes)
    if not used:
        return []
    *down, across = used
    size = (dims.dense_axes | dims.expert_axes)[across]
    columns = next(n for n in range(min(size, _COLUMNS), 0, -1) if size % n == 0)
    labels = [*down, across] if columns < size else down
    head = ["node", *labels, ":", *map(str, range(columns))]
    rows = []
    for first in range(0, dims.world_size, columns):
        nodes = [rank // ranks_per_node for rank in range(first, first + columns)]
        at = dims.coordinates(first)
        ends = [" |" if a != b else "" for a, b in pairwise(nodes)]
        cells = [f"{first + i}{end}" for i, end in enumerate([*ends, ""])]
        spanned = f"{nodes[0]}-{nodes[-1]}" if any(ends) else f"{nodes[0]}"
        rows.append([spanned, *(str(at[axis]) for axis in labels), ":", *cells])
    return [f"{title}, {across} across:", *_table([head, *rows], blank_repeats=1)]


def _groups(dims: "ParallelDims", ranks_per_node: int) -> list[str]:
    from moesys.config.nodes import crossing_groups, spell_groups

    rows = []
    for axis in _used(dims, (*_DENSE, *_EXPERT[1:])):
        groups = dims.groups(axis)
        crossing = crossing_groups(dims, axis, ranks_per_node)
        where = f"  ({len(crossing)} across nodes)" if crossing else ""
        count = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
        rows.append([f"{axis}:", f"{count} of {len(groups[0])}:", f"{spell_groups(groups)}{where}"])
    return _table(rows, left=True)


def _ranks(dims: "ParallelDims", ranks_per_node: int) -> list[str]:
    axes = _used(dims, (*_DENSE, *_EXPERT[1:]))
    rows = []
    for rank in range(dims.world_size):
        at = dims.coordinates(rank)
        rows.append([str(rank), str(rank // ranks_per_node), *(str(at[axis]) for axis in axes)])
    return _table([["rank", "node", *axes], *rows])


def _used(dims: "ParallelDims", axes: Iterable[str]) -> list[str]:
    sizes = dims.dense_axes | dims.expert_axes
    return [axis for axis in axes if sizes[axis] > 1]


def _table(rows: list[list[str]], *, left: bool = False, blank_repeats: int = 0) -> list[str]:
    """Lines with columns of equal width; the first `blank_repeats` cells are blank where they repeat."""
    widths = [max(len(cell.rstrip(" |")) for cell in column) for column in zip(*rows, strict=True)]
    tails = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    last: list[str] = []
    lines = []
    for row in rows:
        cells = [
            "" if i < blank_repeats and [cell] == last[i : i + 1] else cell
            for i, cell in enumerate(row)
        ]
        last = row
        lines.append("  ".join(map(_aligned, cells, widths, tails, repeat(left))).rstrip())
    return lines


def _aligned(cell: str, width: int, tail: int, left: bool) -> str:
    """The number of a cell to the right, what marks it behind that."""
    number = cell.rstrip(" |")
    mark = cell[len(number) :].ljust(tail - width)
    return (number.ljust(width) if left else number.rjust(width)) + mark
