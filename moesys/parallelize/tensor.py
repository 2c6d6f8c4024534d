"""Dense matrices cut over tp: attention by heads, feed-forwards by hidden width, embedding and head by vocabulary.

With sequence parallelism the ranks share out the tokens between these regions; norms, routers, shared experts and
the exchange work on a rank's own tokens. Shapes: T tokens, D model.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moesys.config.schema import Recompute
from moesys.models.attention import Attention
from moesys.models.transformer import DenseBlock, MemoryBlock, MoEBlock, Transformer, modules_of
from moesys.moe.experts import SwiGLU
from moesys.ops.autocast import compute_type
from moesys.ops.projection import Projection
from moesys.parallel.tensor import TensorParallel
from moesys.parallel.vocabulary import VocabularyParallel


def shard_tensors(
    model: Transformer, mesh: DeviceMesh, tp: TensorParallel, recompute: Recompute
) -> None:
    """Cut the model over `mesh`, the one axis of `tp`'s ranks. Names and global shapes stay."""
    in_recomputation = partial(tp.project, keep_gathered=True)
    for attention in modules_of(model, Attention):
        _shard_attention(attention, mesh, tp)
    for block in model.blocks():
        makes_again = recompute in ("attention", "selective", "layer")
        _region(block.attn, in_recomputation if makes_again else tp.project, tp)
        if isinstance(block, DenseBlock):
            _shard_swiglu(block.ffn, mesh)
            _region(block.ffn, in_recomputation if recompute == "layer" else tp.project, tp)
        if not tp.sequence_parallel:
            _share_tokens(block, tp)
    vocabulary = VocabularyParallel(model.config.vocab_size, tp)
    if model.embed is not None:
        if not isinstance(model.embed.weight, DTensor):  # a stage of this rank that shares it
            _cut(model.embed, "weight", 0, mesh)
        model.embed.lookup = vocabulary.embed
    if model.head is not None:
        _cut(model.head, "weight", 0, mesh)
        model.head.project = lambda x, *weights: tp.project(compute_type(x), *weights)
        model.cross_entropy_sum = vocabulary.cross_entropy_sum
    model.tie()


def _share_tokens(block: DenseBlock | MoEBlock, tp: TensorParallel) -> None:
    """Each rank routes, or reads memory for, its own share of the tokens, which all ranks have."""
    if isinstance(block, MoEBlock):
        block.moe.register_forward_pre_hook(lambda _, args: (tp.split(args[0]), *args[1:]))
        block.moe.register_forward_hook(lambda _, args, out: (tp.join(out[0]), *out[1:]))
    elif isinstance(block, MemoryBlock):

        def join(_module: nn.Module, _args: Any, y_TD: Tensor) -> Tensor:
            return tp.join(y_TD)

        block.memory.register_forward_pre_hook(lambda _, args: (tp.split(args[0]), *args[1:]))
        block.memory.register_forward_hook(join)


def _shard_attention(attention: Attention, mesh: DeviceMesh, tp: TensorParallel) -> None:
    if attention.gate is not None:
        attention.gate.enter = tp.enter
    for matrix in (attention.wq, attention.wk, attention.wv):
        _cut(matrix, "weight", 0, mesh)
    _cut(attention.wo, "weight", 1, mesh)


def _shard_swiglu(ffn: SwiGLU, mesh: DeviceMesh) -> None:
    _cut(ffn, "gate_up", 1, mesh)
    _cut(ffn, "down", 1, mesh)


def _cut(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    whole = module.get_parameter(name)
    if isinstance(whole, DTensor):
        return  # shared with another stage of this rank
    local = whole.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()
    sharded = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)
    module.register_parameter(name, torch.nn.Parameter(sharded))


def _region(module: Attention | SwiGLU, project: Projection, tp: TensorParallel) -> None:
    """A module of cut matrices: all tokens in, its own tokens' sums out."""

    def leave(_module: nn.Module, _args: Any, partial_TD: Tensor) -> Tensor:
        return tp.leave(partial_TD)

    module.project = project
    module.register_forward_hook(leave)
