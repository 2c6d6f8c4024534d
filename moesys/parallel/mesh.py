"""The meshes of a run, built from ParallelDims over the default process group."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moesys.parallel.dims import ParallelDims


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """Two factorings of the same ranks: dp for dense parameters, (edp, ep) for experts."""

    dims: ParallelDims
    expert: DeviceMesh
    """Axes ("edp", "ep")."""

    @property
    def ep(self) -> DeviceMesh:
        return self.expert["ep"]

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """All ranks: each sees its own tokens."""
        group = dist.group.WORLD
        assert group is not None
        return group

    @property
    def ep_group(self) -> dist.ProcessGroup:
        return self.expert.get_group("ep")

    @property
    def edp_group(self) -> dist.ProcessGroup:
        return self.expert.get_group("edp")


def build_meshes(dims: ParallelDims, device_type: str) -> Meshes:
    """Collective: every rank calls it once, after the process group exists."""
    expert = init_device_mesh(device_type, (dims.edp, dims.ep), mesh_dim_names=("edp", "ep"))
    return Meshes(dims=dims, expert=expert)
