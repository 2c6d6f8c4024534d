"""From a configuration to a model on this rank: meta, experts sharded, storage, weights."""

import torch
from torch.distributed.tensor import DTensor, Shard

from moesys.config.schema import ModelConfig
from moesys.models.init import initialize
from moesys.models.transformer import Transformer
from moesys.moe.dispatch import ExpertParallelDispatcher
from moesys.moe.layer import MoELayer
from moesys.parallel.exchange import FlatExchange
from moesys.parallel.mesh import Meshes


def build_model(
    config: ModelConfig, meshes: Meshes | None, device: torch.device, seed: int
) -> Transformer:
    """The model with this rank's shards, on `device`, initialised. `meshes=None` = one process without groups."""
    with torch.device("meta"):
        model = Transformer(config)
    if meshes is not None:
        for layer in model.moe_layers():
            shard_experts(layer, meshes)
    model.to_empty(device=device)
    model.tie()
    initialize(model, config, seed)
    return model


def shard_experts(layer: MoELayer, meshes: Meshes) -> None:
    """Keep this rank's experts of the layer, exchange rows over the ep axis, count load over dp."""
    layer.balance.group = meshes.dp_group
    if meshes.dims.ep == 1:
        return
    layer.dispatcher = ExpertParallelDispatcher(
        layer.config.num_experts, FlatExchange(meshes.ep_group)
    )
    for name, parameter in list(layer.experts.named_parameters()):
        local = parameter.chunk(meshes.dims.ep)[meshes.ep.get_local_rank()]
        sharded = DTensor.from_local(local, meshes.ep, [Shard(0)], run_check=False)
        layer.experts.register_parameter(name, torch.nn.Parameter(sharded))
