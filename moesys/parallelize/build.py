"""From a configuration to a model on this rank. The one place that fixes the order in which axes are applied:
pipeline cut, experts, tensors, context, compilation, recompute, offload, data; then storage and weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn

from moesys.config.schema import DispatchConfig, ModelConfig, RunConfig
from moesys.models.init import initialize
from moesys.models.memory_layer import MemoryTable
from moesys.models.transformer import MoEBlock, Transformer, modules_of
from moesys.moe.held_experts import HeldExperts
from moesys.moe.layer import MoELayer
from moesys.moe.layer_placement import LayerPlacement
from moesys.parallel.mesh import Meshes
from moesys.parallel.tensor import TensorParallel
from moesys.parallelize.compile import compile_blocks
from moesys.parallelize.context import shard_context, share_pieces
from moesys.parallelize.data import shard_data
from moesys.parallelize.experts import (
    AS_IT_IS,
    copy_collectives,
    shard_experts,
    shard_memory,
)
from moesys.parallelize.gradients import gradient_sums
from moesys.parallelize.offload import Offload
from moesys.parallelize.pipeline import Pipeline
from moesys.parallelize.recompute import apply_recompute
from moesys.parallelize.tensor import shard_tensors


@dataclass(frozen=True, kw_only=True)
class ParallelModel:
    """A model on this rank, and what its parallel axes ask of the training step."""

    whole: Transformer
    """All that this rank has of the decoder, under the decoder's names."""
    parts: list[Transformer]
    """Its pipeline stages; [whole] without a pipeline. Run these."""
    gradient_sums: list[tuple[dist.ProcessGroup, list[nn.Parameter]]] = field(default_factory=list)
    pipeline: Pipeline | None = None
    copies: set[nn.Parameter] = field(default_factory=set)
    """Parameters that a rank of another stage has too, which counts them in the gradient norm."""
    offload: Offload | None = None
    """What has activations wait in host memory; with train.offload_ratio=null none, until it is told how many."""


def build_model(
    config: ModelConfig, meshes: Meshes | None, device: torch.device, seed: int
) -> Transformer:
    """The model on `device`, initialised; with `meshes`, this rank's experts of it. For one process or ep alone."""
    with torch.device("meta"):
        model = Transformer(config)
    if meshes is not None:
        _shard_with_experts(model, meshes, AS_IT_IS)
    _materialize([model], device)
    initialize(model, config, seed)
    return model


def build_parallel_model(config: RunConfig, meshes: Meshes, device: torch.device) -> ParallelModel:
    """Collective. The model with this rank's shards under every axis of `meshes`, on `device`, initialised."""
    parallel = config.parallel
    with torch.device("meta"):
        pipeline = (
            Pipeline(config.model, parallel, meshes, config.data.seq_len)
            if meshes.dims.pp > 1
            else None
        )
        parts = [Transformer(config.model)] if pipeline is None else pipeline.parts
        _tie(parts)
        whole = parts[0] if len(parts) == 1 else _whole(config.model, parts)
    # Otherwise the step is judged by its loss, and dropped.
    is_checked = config.anomaly.policy == "stop"
    releases = config.placement.release
    _shard_with_experts(whole, meshes, config.dispatch, is_checked, releases)
    for part in parts:
        _begin_copies_early(part)
    if pipeline is None:  # whose backwards mix
        _follow_backward(whole)
    if meshes.dims.tp > 1:
        tp = TensorParallel(meshes.tp_group, parallel.sequence_parallel)
        for part in parts:
            shard_tensors(part, meshes.dense["tp"], tp, config.train.recompute)
        _tie(parts)
    for part in parts:
        if config.batch.is_planned:
            share_pieces(part, meshes)
        elif meshes.dims.cp > 1:
            shard_context(part, meshes, parallel.cp_attention)
    for part in parts:
        if config.train.compile:
            compile_blocks(part)
        apply_recompute(part, config.train.recompute)
    offload = _offload(config, parts, device)
    if parallel.zero:
        for part in parts:
            shard_data(part, meshes, parallel.zero)
    _materialize(parts, device)
    initialize(whole, config.model, config.run.seed)
    sums = gradient_sums(
        dict(whole.named_parameters()),
        meshes,
        zero=parallel.zero,
        sequence_parallel=parallel.sequence_parallel,
        whole_on_owners={
            p for experts in modules_of(whole, HeldExperts) for p in experts.parameters()
        },
    )
    copies: set[nn.Parameter] = set()
    if pipeline is not None and (over_depth := list(whole.over_depth.parameters())):
        sums.append((meshes.pp_group, over_depth))
        copies |= set() if parts[0].is_first else set(over_depth)
    if meshes.ends_group is not None and _has_a_table_of_two(parts):
        table = whole.get_parameter("embed.weight")
        sums.append((meshes.ends_group, [table]))
        copies |= set() if parts[0].is_first else {table}
    return ParallelModel(
        whole=whole,
        parts=parts,
        gradient_sums=sums,
        pipeline=pipeline,
        copies=copies,
        offload=offload,
    )


def _offload(config: RunConfig, parts: list[Transformer], device: torch.device) -> Offload | None:
    ratio = config.train.offload_ratio
    if ratio == 0:
        return None
    offload = Offload(device, lambda _: ratio or 0.0)
    for part in parts:
        offload.wrap(part)
    return offload


def _shard_with_experts(
    model: Transformer,
    meshes: Meshes,
    dispatch: DispatchConfig,
    is_checked: bool = True,
    releases: bool = False,
) -> None:
    collectives = copy_collectives(meshes)
    for layer in modules_of(model, MoELayer):
        shard_experts(layer, meshes, dispatch, is_checked, collectives, releases)
    for table in modules_of(model, MemoryTable):
        shard_memory(table, meshes)


def _begin_copies_early(part: Transformer) -> None:
    """Copies of a layer's experts set out under the experts of the layer before, where a dense block is before it with that, and at
    the latest with its own."""
    blocks = list(part.blocks())
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        own, ahead = _placement_of(block), _placement_of(following)
        if own is not None:  # which begins the next layer's once its rows have come
            block.register_forward_pre_hook(partial(_call, own.enter))
        elif ahead is not None:
            block.register_forward_pre_hook(partial(_call, ahead.begin_ahead))


def _call(begin: Callable[[], None], *_: object) -> None:
    begin()


def _placement_of(block: nn.Module | None) -> LayerPlacement | None:
    return block.moe.placement if isinstance(block, MoEBlock) else None


def _follow_backward(model: Transformer) -> None:
    """Each layer knows the ones before and after it, under whose experts copies and gradients set out."""
    placed = [layer.placement for layer in model.moe_layers() if layer.placement is not None]
    for earlier, later in pairwise(placed):
        earlier.later, later.earlier = later, earlier


def _has_a_table_of_two(parts: list[Transformer]) -> bool:
    """Whether another rank has this rank's embedding too: the first and the last stage do, if they are on two ranks."""
    first, last = parts[0], parts[-1]
    return first.config.has_two_tables and first.is_first != (last.head is not None)


def _whole(config: ModelConfig, parts: list[Transformer]) -> Transformer:
    """One module with the modules of all parts, for their names."""
    whole = Transformer(config, [int(i) for part in parts for i in part.layers])
    for part in parts:
        whole.layers.update(dict(part.layers.items()))
        whole.mtp.update(dict(part.mtp.items()))
        for name in ("embed", "norm", "head"):
            if getattr(part, name) is not None:
                setattr(whole, name, getattr(part, name))
    whole.over_depth.update(dict(parts[0].over_depth.items()))
    return whole


def _materialize(parts: list[Transformer], device: torch.device) -> None:
    for part in parts:
        part.to_empty(device=device)
    _tie(parts)


def _tie(parts: list[Transformer]) -> None:
    """Make embedding and head one parameter where the configuration says so, also of two stages of this rank."""
    first, last = parts[0], parts[-1]
    for part in parts:
        part.tie()
        for name, module in first.over_depth.items():
            part.share_over_depth(name, module)
    if last is not first and first.is_first and last.head is not None:
        last.embed = first.embed if last.mtp else None
        if first.config.tie_embeddings and first.embed is not None:
            last.head.weight = first.embed.weight
