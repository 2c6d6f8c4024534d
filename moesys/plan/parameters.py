"""A rank's parameters as shapes: what tp, ep and etp leave of each, and what FSDP makes of that. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from moesys.config.schema import ModelConfig, MoEConfig


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a rank before data ranks share it out."""

    shape: tuple[int, ...]
    """What is left here."""
    cut_dims: frozenset[int] = frozenset()
    """Dims that tp, ep or etp cut."""
    is_expert: bool = False
    """An expert's, or of a memory's table, which lies with the experts."""
    is_cut: bool = False
    """Over tp."""
    sees_a_share: bool = False
    """Only a tp rank's tokens or heads, also without sequence parallelism."""
    is_over_depth: bool = False
    """One for all MoE layers; a copy on every rank of a pipeline, also one without MoE layers."""

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    def is_partial_over_tp(self, sequence_parallel: bool) -> bool:
        """Whether each tp rank's gradient is a part of the sum (experts see all that they serve)."""
        whole = not self.is_cut and not self.is_expert
        return whole and (sequence_parallel or self.sees_a_share)

    def shard_dim(self, num_shards: int) -> int:
        """As parallelize.data: the first dim that cuts evenly, but for dims cut already; else 0."""
        for dim, length in enumerate(self.shape):
            if dim not in self.cut_dims - {0} and length % num_shards == 0:
                return dim
        return 0

    def padded_shard(self, num_shards: int) -> int:
        """Elements of each rank's shard as it travels: as many as the largest."""
        length = self.shape[self.shard_dim(num_shards)]
        return self.size // length * -(-length // num_shards)

    def shard_of(self, rank: int, num_shards: int) -> int:
        """Elements that the rank has."""
        length = self.shape[self.shard_dim(num_shards)]
        chunk = -(-length // num_shards)
        return self.size // length * max(0, min(chunk, length - rank * chunk))


def block_parameters(
    model: ModelConfig, axes: Mapping[str, int], layer: int
) -> Iterator[Parameter]:
    """Of one layer, but what it shares with others."""
    is_dense = layer not in model.moe_layers
    yield from (Parameter(shape=(model.d_model,)) for _ in ("attn_norm", "ffn_norm"))
    if is_dense or model.share_depth != "all":
        yield from _attention(model, axes["tp"])
    if is_dense:
        yield _cut((2, model.d_ffn, model.d_model), 1, axes["tp"])
        yield _cut((model.d_model, model.d_ffn), 1, axes["tp"])
        if layer in model.memory_layers.layers:
            yield from _memory(model, axes["ep"])
    elif model.share_depth == "none":
        yield from _moe(model, model.moe_of(layer), axes)


def parameters_over_depth(model: ModelConfig, axes: Mapping[str, int]) -> Iterator[Parameter]:
    """What all MoE layers have one of."""
    if model.share_depth == "none" or not model.moe_layers:
        return
    attention = _attention(model, axes["tp"]) if model.share_depth == "all" else ()
    for parameter in (*_moe(model, model.moe, axes), *attention):
        yield replace(parameter, is_over_depth=True)


def _attention(model: ModelConfig, tp: int) -> Iterator[Parameter]:
    d_model, head_dim = model.d_model, model.resolved_head_dim
    queries, keys = model.total_heads * head_dim, model.total_kv_heads * head_dim
    for rows in (queries, keys, keys):
        yield _cut((rows, d_model), 0, tp)
    yield _cut((d_model, queries), 1, tp)
    if model.attention_experts > 1:
        yield Parameter(shape=(model.attention_experts, d_model))
    if model.qk_norm:
        yield from (Parameter(shape=(head_dim,), sees_a_share=True) for _ in ("q", "k"))


def _moe(model: ModelConfig, moe: MoEConfig, axes: Mapping[str, int]) -> Iterator[Parameter]:
    d_model = model.d_model
    yield Parameter(shape=(moe.num_choices, d_model), sees_a_share=True)
    if moe.num_shared_experts:
        hidden = moe.num_shared_experts * moe.d_expert
        yield Parameter(shape=(2, hidden, d_model), sees_a_share=True)
        yield Parameter(shape=(d_model, hidden), sees_a_share=True)
    if moe.shared_gate != "none":
        scores = 1 if moe.shared_gate == "sigmoid" else 2
        yield Parameter(shape=(scores, d_model), sees_a_share=True)
    if moe.d_latent is not None:
        yield Parameter(shape=(moe.d_latent, d_model), sees_a_share=True)
        yield Parameter(shape=(d_model, moe.d_latent), sees_a_share=True)
    if moe.constant_experts:
        yield Parameter(shape=(moe.constant_experts, d_model), sees_a_share=True)
        yield Parameter(shape=(moe.constant_experts, 2, d_model), sees_a_share=True)
    experts = moe.num_experts // (len(moe.widths) * axes["ep"])
    cut = frozenset(
        dim for dim, size in ((0, axes["ep"] * axes["etp"]), (2, axes["etp"])) if size > 1
    )
    for width in moe.widths:
        hidden = width // axes["etp"]
        yield Parameter(shape=(experts, 2, hidden, model.d_row), cut_dims=cut, is_expert=True)
        yield Parameter(shape=(experts, model.d_row, hidden), cut_dims=cut, is_expert=True)


def _memory(model: ModelConfig, ep: int) -> Iterator[Parameter]:
    """Of a memory layer beside its feed-forward."""
    memory, d_model = model.memory_layers, model.d_model
    shapes: list[tuple[int, ...]] = [
        (2 * memory.d_key, d_model),
        (memory.d_key,),
        (2, memory.rank, memory.num_keys, memory.d_key),
        (memory.heads, memory.rank, memory.rank),
        (d_model, memory.d_value),
    ]
    tables: list[tuple[int, ...]] = [
        (memory.heads, memory.num_keys**2, memory.d_value // memory.heads // ep)
    ]
    if memory.d_pre:
        shapes.append((memory.d_pre, d_model))
        tables.append((memory.num_keys**2, memory.d_pre // ep))
    for shape in shapes:
        yield Parameter(shape=shape, sees_a_share=True)
    for shape in tables:
        cut = frozenset({len(shape) - 1} if ep > 1 else ())
        yield Parameter(shape=shape, cut_dims=cut, is_expert=True)


def outer_parameters(
    model: ModelConfig, axes: Mapping[str, int], has_table: bool, has_last: bool
) -> Iterator[Parameter]:
    """The embedding where a stage has it; last norm, head and what joins layers of multi-token prediction where it is
    the last. A tied head is the embedding."""
    if has_table:
        yield _cut((model.vocab_size, model.d_model), 0, axes["tp"])
    if not has_last:
        return
    yield Parameter(shape=(model.d_model,))
    if not model.tie_embeddings:
        yield _cut((model.vocab_size, model.d_model), 0, axes["tp"])
    for _ in range(model.mtp_depth):
        yield from (Parameter(shape=(model.d_model,)) for _ in ("embed", "hidden", "last"))
        yield Parameter(shape=(model.d_model, 2 * model.d_model))


def _cut(shape: tuple[int, ...], dim: int, tp: int) -> Parameter:
    """Over tp along one dim."""
    if tp == 1:
        return Parameter(shape=shape)
    here = tuple(length // tp if d == dim else length for d, length in enumerate(shape))
    return Parameter(shape=here, cut_dims=frozenset({dim}), is_cut=True)
