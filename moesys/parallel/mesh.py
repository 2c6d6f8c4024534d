"""The process groups of a run, built from ParallelDims over the default process group."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moesys.parallel.dims import ParallelDims


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


def build_meshes(dims: ParallelDims, device_type: str) -> Meshes:
    """Collective: every rank calls it once, after the process group exists."""
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
    )


def _mesh(device_type: str, axes: dict[str, int]) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def _ends_group(dims: ParallelDims) -> dist.ProcessGroup | None:
    ends = [[ranks[0], ranks[-1]] for ranks in dims.groups("pp")] if dims.pp > 1 else []
    made = _group(ends)
    return made if any(dist.get_rank() in ranks for ranks in ends) else None


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
