"""The process groups of a run, built from ParallelDims over the default process group."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moesys.parallel.dims import ParallelDims, nodes_and_rails


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """Two factorings of the same ranks, and the groups that sum over several axes of one."""

    dims: ParallelDims
    dense: DeviceMesh
    """Axes ("pp", "dp_replicate", "shard", "tp"), shard = dp_shard * cp: where dense parameters lie."""
    expert: DeviceMesh
    """Axes ("pp", "edp_replicate", "edp_shard", "ep", "etp"): where experts lie."""
    stage_group: dist.ProcessGroup
    """All ranks of this pipeline stage: each has tokens of its own."""
    replica_group: dist.ProcessGroup
    """Ranks of the stage with the same tp rank (dp and cp): together they see all tokens."""
    sequence_group: dist.ProcessGroup
    """Ranks that share sequences (cp and tp)."""
    cp_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup
    """Ranks that hold the same experts (edp_replicate and edp_shard)."""
    ends_group: dist.ProcessGroup | None
    """The first and the last rank of this rank's pipeline; None between them, and without a pipeline."""
    ranks_per_node: int | None = None
    """That are near each other: rank r is on node r // ranks_per_node. None = all."""
    ep_node_group: dist.ProcessGroup | None = None
    """Of the ep group, the ranks on this rank's node. None, as the next, where the meshes are not cut by nodes."""
    ep_rail_group: dist.ProcessGroup | None = None
    """Of the ep group, the ranks of this rank's place in all its nodes."""
    copies_group: dist.ProcessGroup | None = None
    """The ranks of the ep group once more, for copies of experts, which travel beside rows. None where there are none."""

    @property
    def nodes(self) -> tuple[int, int]:
        """How many there are, and which is this rank's."""
        per_node = self.ranks_per_node or self.dims.world_size
        return -(-self.dims.world_size // per_node), dist.get_rank() // per_node

    @property
    def ep_per_node(self) -> int:
        """Ranks of an ep group that are near each other, one after the other. Raises ValueError where nodes have unequal numbers."""
        per_node = self.ranks_per_node or self.dims.world_size
        return len(nodes_and_rails(dist.get_process_group_ranks(self.ep_group), per_node)[0][0])

    @property
    def ep_nodes(self) -> int:
        """That an ep group lies on, of the one that lies on most: the same on all ranks. Raises ValueError as `ep_per_node`."""
        per_node = self.ranks_per_node or self.dims.world_size
        return max(len(nodes_and_rails(ranks, per_node)[0]) for ranks in self.dims.groups("ep"))

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.dense.get_group("pp")

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.dense.get_group("tp")

    @property
    def ep_group(self) -> dist.ProcessGroup:
        return self.expert.get_group("ep")

    @property
    def etp_group(self) -> dist.ProcessGroup:
        return self.expert.get_group("etp")

    @property
    def dp_rank(self) -> int:
        """Which samples this rank reads, 0..dp-1."""
        at = self.dims.coordinates(dist.get_rank())
        return at["dp_replicate"] * self.dims.dp_shard + at["dp_shard"]


def build_meshes(
    dims: ParallelDims,
    device_type: str,
    ranks_per_node: int | None = None,
    cuts_by_node: bool = False,
    has_copies: bool = False,
) -> Meshes:
    """Collective: every rank calls it once, after the process group exists. `cuts_by_node`: with groups inside ep;
    `has_copies`: with one for copies of experts.

    Raises:
        ValueError: groups inside ep are wanted where nodes have unequal numbers of its ranks.
    """
    nodes: list[list[int]] = []
    rails: list[list[int]] = []
    if cuts_by_node:
        if ranks_per_node is None:
            raise ValueError(
                "nodes have different numbers of ranks: set dispatch.ranks_per_node, or dispatch.exchange=flat"
            )
        for ranks in dims.groups("ep"):
            own_nodes, own_rails = nodes_and_rails(ranks, ranks_per_node)
            nodes, rails = nodes + own_nodes, rails + own_rails
    dense = {
        "pp": dims.pp,
        "dp_replicate": dims.dp_replicate,
        "shard": dims.dp_shard * dims.cp,
        "tp": dims.tp,
    }
    return Meshes(
        dims=dims,
        dense=_mesh(device_type, dense),
        expert=_mesh(device_type, dims.expert_axes),
        stage_group=_group(dims.groups("dp_replicate", "dp_shard", "cp", "tp")),
        replica_group=_group(dims.groups("dp_replicate", "dp_shard", "cp")),
        sequence_group=_group(dims.groups("cp", "tp")),
        cp_group=_group(dims.groups("cp")),
        edp_group=_group(dims.groups("edp_replicate", "edp_shard")),
        ends_group=_ends_group(dims),
        ranks_per_node=ranks_per_node,
        ep_node_group=_group(nodes) if cuts_by_node else None,
        ep_rail_group=_group(rails) if cuts_by_node else None,
        copies_group=_own_group(dims.groups("ep")) if has_copies and dims.ep > 1 else None,
    )


def _mesh(device_type: str, axes: dict[str, int]) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def _ends_group(dims: ParallelDims) -> dist.ProcessGroup | None:
    ends = [[ranks[0], ranks[-1]] for ranks in dims.groups("pp")] if dims.pp > 1 else []
    made = _group(ends)
    return made if any(dist.get_rank() in ranks for ranks in ends) else None


def _own_group(groups: Iterable[list[int]]) -> dist.ProcessGroup:
    """As `_group`, and never one that others use."""
    made = [dist.new_group(ranks) for ranks in groups]
    (mine,) = (group for group in made if isinstance(group, dist.ProcessGroup))
    return mine


def _group(groups: Iterable[list[int]]) -> dist.ProcessGroup:
    """The one of `groups` that this rank is in; all ranks make all of them, in order."""
    world = dist.group.WORLD
    assert world is not None
    mine = world
    for ranks in groups:
        if len(ranks) < dist.get_world_size():
            made = dist.new_group(ranks)
            if isinstance(made, dist.ProcessGroup) and dist.get_rank() in ranks:
                mine = made
    return mine
