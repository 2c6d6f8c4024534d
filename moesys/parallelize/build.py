"""From a configuration to a model on this rank. The one place that fixes the order in which axes are applied:
experts, tensors, context, data, pipeline; then storage and weights.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from moesys.config.schema import ModelConfig, ParallelConfig
from moesys.models.init import initialize
from moesys.models.transformer import Transformer
from moesys.parallel.mesh import Meshes
from moesys.parallel.tensor import TensorParallel
from moesys.parallelize.data import shard_data
from moesys.parallelize.experts import shard_experts
from moesys.parallelize.gradients import gradient_sums
from moesys.parallelize.tensor import shard_tensors


@dataclass(frozen=True, kw_only=True)
class ParallelModel:
    """A model on this rank, and what its parallel axes ask of the training step."""

    whole: Transformer
    """All that this rank has of the decoder, under the decoder's names."""
    parts: list[Transformer]
    """Its pipeline stages; [whole] without a pipeline. Run these."""
    gradient_sums: list[tuple[dist.ProcessGroup, list[nn.Parameter]]] = field(default_factory=list)
    tp: TensorParallel | None = None


def build_model(
    config: ModelConfig, meshes: Meshes | None, device: torch.device, seed: int
) -> Transformer:
    """The model with this rank's experts, on `device`, initialised. `meshes=None` = one process without groups."""
    return build_parallel_model(config, ParallelConfig(), meshes, device, seed).whole


def build_parallel_model(
    config: ModelConfig,
    parallel: ParallelConfig,
    meshes: Meshes | None,
    device: torch.device,
    seed: int,
) -> ParallelModel:
    """Collective. The model with this rank's shards under every axis of `meshes`, on `device`, initialised."""
    with torch.device("meta"):
        model = Transformer(config)
    if meshes is None:
        return ParallelModel(whole=_materialize(model, config, device, seed), parts=[model])

    for layer in model.moe_layers():
        shard_experts(layer, meshes)
    tp = None
    if meshes.dims.tp > 1:
        tp = TensorParallel(meshes.tp_group, parallel.sequence_parallel)
        shard_tensors(model, meshes.dense["tp"], tp)
    if parallel.zero:
        shard_data(model, meshes, parallel.zero)
    whole = _materialize(model, config, device, seed)
    sums = gradient_sums(
        dict(whole.named_parameters()),
        meshes,
        zero=parallel.zero,
        sequence_parallel=parallel.sequence_parallel,
    )
    return ParallelModel(whole=whole, parts=[model], gradient_sums=sums, tp=tp)


def _materialize(
    model: Transformer, config: ModelConfig, device: torch.device, seed: int
) -> Transformer:
    model.to_empty(device=device)
    model.tie()
    initialize(model, config, seed)
    return model
