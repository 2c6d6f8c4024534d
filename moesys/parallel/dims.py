"""Who works with whom, as integers. No torch, no process group.

The ranks 0..world-1 are one grid, read in two ways. pp varies slowest and is common to both, so a pipeline
stage is a run of neighbours; within a stage

    dp * cp * tp == edp * ep * etp        dp = dp_replicate * dp_shard

with tp, or etp, varying fastest, so that the groups that talk most are neighbours (inside one node where they fit).
Expert groups fold over data, context and tensor ranks: each of these has tokens of its own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

from moesys.config.schema import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Degrees of one run. Raises ValueError, with all reasons, when they do not factor the world."""

    world_size: int
    pp: int = 1
    """Pipeline stages."""
    dp_shard: int = 1
    """Data ranks that share one copy of the dense parameters (FSDP); the other factor of dp replicates."""
    cp: int = 1
    """Ranks that share each sequence."""
    tp: int = 1
    """Ranks that share each dense matrix."""
    ep: int = 1
    """Ranks that share out the experts."""
    etp: int = 1
    """Ranks that share each expert's matrices."""

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise ValueError("; ".join(problems))

    def problems(self) -> Iterator[str]:
        """Every equation that these degrees break."""
        for field in fields(self):
            if getattr(self, field.name) < 1:
                yield f"{field.name}={getattr(self, field.name)} must be at least 1"
                return
        dense = self.pp * self.cp * self.tp
        if self.world_size % dense:
            yield f"pp={self.pp} * cp={self.cp} * tp={self.tp} = {dense} must divide world_size={self.world_size}"
            return
        if self.dp % self.dp_shard:
            yield f"dp_shard={self.dp_shard} must divide dp={self.dp}"
        experts = self.ep * self.etp
        if self.stage_size % experts:
            yield (
                f"ep={self.ep} * etp={self.etp} = {experts} must divide the {self.stage_size} ranks of a "
                "pipeline stage"
            )
        elif self.dp_shard > 1 and self._copy_size % experts and experts % self._copy_size:
            yield (
                f"ep={self.ep} * etp={self.etp} = {experts} must divide dp_shard*cp*tp={self._copy_size}, the ranks "
                "that share one copy of the dense parameters, or be a multiple of it"
            )

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage; each has tokens of its own (tp ranks split them between them)."""
        return self.world_size // self.pp

    @property
    def dp(self) -> int:
        """Ranks that read different samples."""
        return self.world_size // (self.pp * self.cp * self.tp)

    @property
    def dp_replicate(self) -> int:
        """Copies of the dense parameters over data ranks."""
        return self.dp // self.dp_shard

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts, before these are sharded over them."""
        return self.stage_size // (self.ep * self.etp)

    @property
    def edp_shard(self) -> int:
        """Ranks over which a copy of the experts is sharded: those of one dense copy that ep and etp leave over."""
        return max(1, self._copy_size // (self.ep * self.etp)) if self.dp_shard > 1 else 1

    @property
    def edp_replicate(self) -> int:
        """Copies of the experts."""
        return self.edp // self.edp_shard

    @property
    def _copy_size(self) -> int:
        return self.dp_shard * self.cp * self.tp

    @property
    def dense_axes(self) -> dict[str, int]:
        """Axes of the grid for tokens and dense parameters, slowest first."""
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": self.dp_shard,
            "cp": self.cp,
            "tp": self.tp,
        }

    @property
    def expert_axes(self) -> dict[str, int]:
        """Axes of the same grid for experts, slowest first."""
        return {
            "pp": self.pp,
            "edp_replicate": self.edp_replicate,
            "edp_shard": self.edp_shard,
            "ep": self.ep,
            "etp": self.etp,
        }

    def coordinates(self, rank: int) -> dict[str, int]:
        """The rank's index along each axis of both grids."""
        return _coordinates(rank, self.expert_axes) | _coordinates(rank, self.dense_axes)

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups of ranks that differ along `axes` (of one grid) only; each in rank order, a partition."""
        for grid in (self.dense_axes, self.expert_axes):
            if set(axes) <= grid.keys():
                return _groups(grid, axes)
        raise ValueError(
            f"no grid has the axes {axes}: {[*self.dense_axes]} or {[*self.expert_axes]}"
        )

    def group_of(self, rank: int, *axes: str) -> list[int]:
        """The group of `groups(*axes)` that `rank` is in."""
        return next(group for group in self.groups(*axes) if rank in group)


def nodes_and_rails(
    ranks: Sequence[int], ranks_per_node: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The ranks of one group by node, and by place in their nodes; rank r is on node r // ranks_per_node.

    Raises:
        ValueError: nodes have different numbers of them.
    """
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(rank // ranks_per_node, []).append(rank)
    nodes = list(by_node.values())
    if len({len(node) for node in nodes}) > 1 or [r for node in nodes for r in node] != [*ranks]:
        raise ValueError(
            f"ranks {list(ranks)} do not lie in equal numbers on nodes of {ranks_per_node}, one node after the other"
        )
    return nodes, [list(rail) for rail in zip(*nodes, strict=True)]


def parallel_dims(parallel: ParallelConfig, world_size: int) -> ParallelDims:
    """The dims that a configuration means on `world_size` ranks. Raises ValueError as ParallelDims."""
    dense = ParallelDims(world_size=world_size, pp=parallel.pp, cp=parallel.cp, tp=parallel.tp)
    dp_shard = (parallel.dp_shard or dense.dp) if parallel.zero else 1
    return replace(dense, dp_shard=dp_shard, ep=parallel.ep, etp=parallel.etp)


def _coordinates(rank: int, grid: dict[str, int]) -> dict[str, int]:
    found = {}
    for axis, size in reversed(grid.items()):
        rank, found[axis] = divmod(rank, size)
    return dict(reversed(found.items()))


def _groups(grid: dict[str, int], axes: tuple[str, ...]) -> list[list[int]]:
    strides = dict(zip(grid, _strides([*grid.values()]), strict=True))

    def offsets(names: list[str]) -> list[int]:
        steps = [range(0, grid[name] * strides[name], strides[name]) for name in names]
        return [sum(parts) for parts in product(*steps)]

    inside = offsets([name for name in grid if name in axes])
    return [
        [first + offset for offset in inside]
        for first in offsets([name for name in grid if name not in axes])
    ]


def _strides(sizes: list[int]) -> list[int]:
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
