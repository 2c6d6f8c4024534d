"""Parameters, gradients and optimizer state sharded over data and context ranks, by torch's FSDP2 (2304.11277; the
stages are ZeRO's, 1910.02054). Dense parameters lie on the dense mesh, experts and memory tables on the expert mesh.

    stage 1    optimizer state: parameters are gathered, and gradients reduced, once per optimizer step
    stage 2    and gradients: reduced and kept as shards after every micro-step
    stage 3    and parameters: gathered for each block, forward and backward

Under a pipeline torch's stages reduce gradients once, after the last micro-step, and keep what a backward gathered
until then: stage 2 is then stage 1, and stage 3 frees a block's parameters after its forwards alone.
"""

from collections.abc import Collection

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moesys.models.memory_layer import MemoryTable
from moesys.models.transformer import Transformer, modules_of
from moesys.moe.experts import ExpertClasses, Experts
from moesys.moe.held_experts import HeldExperts
from moesys.parallel.mesh import Meshes


def shard_data(part: Transformer, meshes: Meshes, zero: int) -> None:
    """Wrap the blocks of one pipeline stage, then the stage. Before its parameters have storage."""
    dense = _axes(meshes.dense, "dp_replicate", "shard")
    expert = _axes(meshes.expert, "edp_replicate", "edp_shard")
    experts = modules_of(part, ExpertClasses) or modules_of(part, Experts)
    # Whose number changes from rank to rank: they are whole on their owners.
    held = [p for module in modules_of(part, HeldExperts) for p in module.parameters()]
    for module in (*experts, *modules_of(part, MemoryTable)):
        _shard(module, expert, zero)
    for block in part.blocks():
        _shard(block, dense, zero, held)
    # A table that serves two ends, and a head that is used again, stay with the stage, which is gathered once.
    if not part.config.has_two_tables:
        for outer in (part.embed, part.head):
            if outer is not None:
                _shard(outer, dense, zero)
    _shard(part, dense, zero, held)


def begin_micro_step(part: nn.Module, zero: int, is_last: bool) -> None:
    """Communicate in this micro-step what the stage demands, and all that is left in the last."""
    if not isinstance(part, FSDPModule):
        return
    part.set_requires_gradient_sync(is_last or zero > 1)
    part.set_requires_all_reduce(is_last)
    part.set_reshard_after_backward(is_last or zero > 2)
    part.set_is_last_backward(is_last)


def free_gathered(part: nn.Module) -> None:
    """Back to shards after a forward without backward: what was gathered may be read no more."""
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _axes(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
    """FSDP takes one axis to shard over, or before it one to replicate over."""
    return mesh[shard] if mesh[replicate].size() == 1 else mesh[replicate, shard]


def _shard(
    module: nn.Module, mesh: DeviceMesh, zero: int, but: Collection[nn.Parameter] = ()
) -> None:
    wrapped = fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=zero > 2,
        shard_placement_fn=lambda parameter: _placement(parameter, mesh.size(-1)),
        ignored_params=set(but),
    )
    # Losses are sums divided by the global token count: gradients are summed, never averaged.
    wrapped.set_gradient_divide_factor(1.0)
    wrapped.set_force_sum_reduction_for_comms(True)


def _placement(parameter: nn.Parameter, size: int) -> Shard:
    """The first dim whose local length the ranks divide, so that no shard is padded; else dim 0."""
    taken: set[int] = set()
    local = parameter
    if isinstance(parameter, DTensor):
        taken = {p.dim for p in parameter.placements if isinstance(p, Shard)} - {0}
        local = parameter.to_local()
    for dim, length in enumerate(local.shape):
        if dim not in taken and length % size == 0:
            return Shard(dim)
    return Shard(0)
