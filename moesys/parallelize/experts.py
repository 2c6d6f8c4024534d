"""Experts spread over ranks: each keeps its experts (ep) and its slice of their hidden width (etp). A memory layer's
table lies with them: each rank of ep has some of its columns."""

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from moesys.config.dispatch_schema import WireConfig
from moesys.config.schema import ComponentConfig, DispatchConfig
from moesys.models.memory_layer import MemoryTable
from moesys.moe.component import build_codec
from moesys.moe.compression import Compression, WireFormats
from moesys.moe.deduplicated import DeduplicatingDispatcher
from moesys.moe.dispatch import Dispatcher, ExpertParallelDispatcher
from moesys.moe.held_experts import HeldExperts
from moesys.moe.layer import MoELayer
from moesys.moe.layer_placement import LayerPlacement
from moesys.moe.placed import PlacedDispatcher
from moesys.moe.tokens import SequenceShare
from moesys.parallel.columns import ColumnParallel
from moesys.parallel.exchange import FlatExchange
from moesys.parallel.hierarchical import HierarchicalExchange
from moesys.parallel.mesh import Meshes
from moesys.parallel.sparse import SparseCollectives
from moesys.plan.placement import even_owners

AS_IT_IS = DispatchConfig()
HIDDEN_DIM = {"gate_up": 2, "down": 2}
"""Of [E, 2, F, D] and [E, D, F]: where F is."""


def shard_experts(
    layer: MoELayer,
    meshes: Meshes,
    dispatch: DispatchConfig = AS_IT_IS,
    is_checked: bool = True,
    collectives: SparseCollectives | None = None,
    releases: bool = False,
) -> None:
    """Keep this rank's experts of the layer, exchange rows over ep and etp, count load over all that have tokens.

    `is_checked`: what is to be compressed and is not finite is an error. `collectives`: experts may have copies, by these,
    which `releases` frees between a forward and its backward.
    """
    dims = meshes.dims
    layer.balance.group = meshes.stage_group
    if dims.cp * dims.tp > 1:
        layer.share = SequenceShare(
            group=meshes.sequence_group, tp_rank=meshes.dense.get_local_rank("tp"), tp_size=dims.tp
        )
    if dims.ep * dims.etp == 1:
        return
    if dims.ep > 1:
        layer.compression = _compression(layer, dispatch.codec, dispatch.wire, is_checked)
        layer.candidates = {
            name: _compression(layer, candidate.codec, candidate.wire, is_checked)
            for name, candidate in dispatch.candidates.items()
        }
    _shard_parameters(layer, meshes)
    if collectives is not None:
        layer.placement = _placement(layer, collectives, releases)
    layer.dispatcher = _dispatcher(layer, meshes, dispatch)


def _shard_parameters(layer: MoELayer, meshes: Meshes) -> None:
    for experts in layer.experts.classes():
        for name, parameter in list(experts.named_parameters()):
            if isinstance(parameter, DTensor):
                return  # shared with another layer
            experts.register_parameter(name, _shard(parameter, HIDDEN_DIM[name], meshes))


def copy_collectives(meshes: Meshes) -> SparseCollectives | None:
    """By which experts get copies on other ranks of ep; None where there are none. Collective."""
    group = meshes.copies_group
    if group is None:
        return None
    return SparseCollectives(group, meshes.ep_per_node)


def _placement(layer: MoELayer, collectives: SparseCollectives, releases: bool) -> LayerPlacement:
    """Each rank begins with its equal run of experts."""
    (experts,) = layer.experts.classes()
    owner_E = even_owners(layer.config.num_experts, collectives.size)
    owned = np.flatnonzero(owner_E == collectives.rank).tolist()
    layer.experts = HeldExperts(experts.gate_up, experts.down, owned)
    return LayerPlacement(layer.experts, owner_E, collectives, releases)


def _compression(
    layer: MoELayer, codec: ComponentConfig | None, wire: WireConfig, is_checked: bool
) -> Compression:
    return Compression(
        codec=codec and build_codec(codec, layer.d_model, layer.layer),
        formats=WireFormats.of(wire, is_checked),
        is_checked=is_checked,
    )


def _dispatcher(layer: MoELayer, meshes: Meshes, dispatch: DispatchConfig) -> Dispatcher:
    moe, per_node = layer.config, meshes.ranks_per_node
    slices = FlatExchange(meshes.etp_group, per_node) if meshes.dims.etp > 1 else None
    num_classes = len(moe.widths)
    if dispatch.exchange == "flat":
        exchange = FlatExchange(meshes.ep_group, per_node)
    else:
        node, rail = meshes.ep_node_group, meshes.ep_rail_group
        assert node is not None, "the meshes are not cut by nodes"
        assert rail is not None
        if dispatch.exchange == "deduplicated":
            return DeduplicatingDispatcher(
                moe.num_experts,
                FlatExchange(rail, per_node),
                FlatExchange(node, per_node),
                slices,
                num_classes,
            )
        exchange = HierarchicalExchange(meshes.ep_group, node, rail, per_node)
    if (placement := layer.placement) is not None:
        near = placement.collectives.per_node
        return PlacedDispatcher(moe.num_experts, exchange, slices, near, placement.decide)
    return ExpertParallelDispatcher(moe.num_experts, exchange, slices, num_classes)


def shard_memory(table: MemoryTable, meshes: Meshes) -> None:
    """Keep this rank's columns of a memory layer's table."""
    ep, mesh = meshes.dims.ep, meshes.expert["ep"]
    if ep == 1:
        return
    table.columns = ColumnParallel(meshes.ep_group, meshes.dims.tp)
    for name, whole in list(table.named_parameters()):
        last = whole.ndim - 1
        local = whole.chunk(ep, last)[mesh.get_local_rank()].contiguous()
        sharded = DTensor.from_local(local, mesh, [Shard(last)], run_check=False)
        table.register_parameter(name, torch.nn.Parameter(sharded))


def _shard(parameter: nn.Parameter, hidden_dim: int, meshes: Meshes) -> nn.Parameter:
    mesh, placements = meshes.expert["ep"], [Shard(0)]
    local = parameter.chunk(meshes.dims.ep)[mesh.get_local_rank()]
    if meshes.dims.etp > 1:
        mesh, placements = meshes.expert["ep", "etp"], [Shard(0), Shard(hidden_dim)]
        local = local.chunk(meshes.dims.etp, hidden_dim)[mesh.get_local_rank("etp")].contiguous()
    return torch.nn.Parameter(DTensor.from_local(local, mesh, placements, run_check=False))
