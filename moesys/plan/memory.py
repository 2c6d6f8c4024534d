"""Bytes that a rank holds while it trains, by formula, before any rank exists. Derived term by term in docs/numerics.md. Pure.

T tokens of a tensor-parallel group in one micro-batch, t = T / tp of them this rank's, D model, V vocabulary, w bytes of
the compute type. Parameters, gradients, optimizer state and the residual stream are fp32.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

from moesys.config.schema import Recompute, RunConfig
from moesys.plan.memory_case import FP32, MemoryCase
from moesys.plan.offload import away_bytes
from moesys.plan.parameters import Parameter

BF16 = 2
MOMENTS = 2
"""AdamW's, per parameter; and one count of steps per tensor."""
CONTEXT_BYTES = 3 << 29
"""1.5 GiB: CUDA context, code of kernels, buffers of NCCL's communicators. An allowance, not measured."""
FRAGMENTED = Fraction(1, 16)
"""Of what is held, what the allocator cannot give out again. An allowance, not measured."""

_MADE_AGAIN: Mapping[Recompute, tuple[Recompute, ...]] = {
    "none": (),
    "moe": ("moe",),
    "attention": ("attention",),
    "selective": ("moe", "attention"),
    "layer": ("layer",),
}
"""What a level makes again, one after the other."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """What one rank holds, in bytes; of terms that come and go, the most."""

    parameters: int
    """Its shards."""
    gradients: int
    """Its shards, as the optimizer reads them."""
    optimizer: int
    gathered: int
    """Parameters that `zero` shares out, whole, and the flat buffer that they come in."""
    unreduced: int
    """Gradients of these, beyond this rank's shards, until they are reduced; and the flat buffer that they leave in."""
    copies: int
    """Of other ranks' experts, in the compute type; the sums of their gradients, and these on their way home."""
    casts: int
    """Weights in bf16, which each forward makes and keeps for its backward."""
    activations: int
    """Kept by the layers, of all micro-batches in flight."""
    boundaries: int
    """With a pipeline: what is received from and handed to other stages; torch has a buffer for each micro-batch of a step."""
    logits: int
    """With what the loss keeps, of all micro-batches in flight."""
    work: int
    """The most that one block, or the head, needs beside these: rows sent and received, what is made again, gradients."""
    summed: int
    """After the last backward: copies of gradients while they are summed over ranks that FSDP does not know."""
    allowance: int
    """CONTEXT_BYTES and FRAGMENTED; 0 on a CPU."""
    host: int
    """Host memory: the copy that an asynchronous checkpoint is written from, and activations that wait there."""

    @property
    def terms(self) -> dict[str, int]:
        """Of the device's memory, by name."""
        return {term.name: getattr(self, term.name) for term in fields(self) if term.name != "host"}

    @property
    def at_backward(self) -> int:
        """At the worst moment of forward and backward."""
        return sum(self.terms.values()) - self.summed - self.allowance

    @property
    def at_update(self) -> int:
        """When gradients are summed."""
        return self.parameters + self.gradients + self.optimizer + self.boundaries + self.summed

    @property
    def held(self) -> int:
        """At the worst moment of a step, all tensors."""
        return max(self.at_backward, self.at_update)

    @property
    def total(self) -> int:
        """Of the device's memory."""
        return self.held + self.allowance


def memory_by_stage(
    config: RunConfig,
    axes: Mapping[str, int],
    stages: Sequence[Sequence[int]],
    *,
    on_gpu: bool = True,
    expert_load: float = 1.0,
) -> list[RankMemory]:
    """Of each pipeline rank, at its worst data, context and tensor rank: the first, whose uneven shards are largest."""
    cases = (
        MemoryCase(
            config=config,
            axes=axes,
            at=dict.fromkeys(axes, 0) | {"pp": pp_rank},
            stages=stages,
            on_gpu=on_gpu,
            expert_load=expert_load,
        )
        for pp_rank in range(config.parallel.pp)
    )
    return [rank_memory(case) for case in cases]


def rank_memory(case: MemoryCase) -> RankMemory:
    """All terms."""
    shards = case.stored_bytes
    tensors = sum(count for count, _ in case.counted_parameters)
    memory = RankMemory(
        parameters=shards,
        gradients=shards,
        optimizer=MOMENTS * shards + FP32 * tensors,
        gathered=_gathered(case),
        unreduced=_unreduced(case),
        copies=_copied_experts(case),
        casts=_casts(case),
        activations=_activations(case),
        boundaries=_boundaries(case),
        logits=_logits(case),
        work=max(_head_work(case), *(_layer_work(case, layer) for layer in _own_kinds(case))),
        summed=_summed(case),
        allowance=0,
        host=_host(case),
    )
    if not case.on_gpu:
        return memory
    allowance = CONTEXT_BYTES + round(memory.held * FRAGMENTED)
    return RankMemory(**{**vars(memory), "allowance": allowance})


# --- What zero shares out -------------------------------------------------------------------------


def _gathered(case: MemoryCase) -> int:
    """Up to stage 2, and by a pipeline's backwards, everything stays gathered; by stage 3 a block."""
    if not case.config.parallel.zero:
        return 0
    if case.config.parallel.zero < 3 or case.config.parallel.pp > 1:
        return _all_flat(case) + _largest_flat(case)
    return _largest_block(case) + _largest_flat(case)


def _unreduced(case: MemoryCase) -> int:
    """Stage 1 and pipelines keep all to the last micro-step; stages 2 and 3 reduce each block after its backward."""
    if not case.config.parallel.zero:
        return 0
    if case.config.parallel.zero == 1 or case.config.parallel.pp > 1:
        return _all_flat(case) - case.sharded_bytes + _largest_flat(case)
    return _largest_block(case) + _largest_flat(case)


def _all_flat(case: MemoryCase) -> int:
    return sum(count * case.flat_bytes(unit) for count, unit in case.sharded_units)


def _largest_flat(case: MemoryCase) -> int:
    return max(case.flat_bytes(unit) for _, unit in case.sharded_units)


def _largest_block(case: MemoryCase) -> int:
    """Experts and the rest of one, or the embedding or the head; and what layers share."""
    blocks = [
        sum(case.flat_bytes(unit) for unit in units if case.is_sharded(unit))
        for _, units in case.blocks
    ]
    units = [unit for _, unit in case.sharded_units]
    shared = [[p for p in unit if p.is_over_depth] for unit in units]
    others = (case.flat_bytes([p for p in unit if not p.is_over_depth]) for unit in units)
    return max([*blocks, *others]) + sum(map(case.flat_bytes, shared))


def _summed(case: MemoryCase) -> int:
    """parallel/gradients.py lays all gradients of a group end to end."""
    parallel, model = case.config.parallel, case.config.model
    total = 0
    if parallel.pp > 1 and model.has_two_tables and case.has_first != case.has_last:
        table = Parameter(shape=(model.vocab_size // case.axes["tp"], model.d_model))
        total += case.shard_bytes(table)
    for count, parameter in case.counted_parameters:
        is_partial = parameter.is_partial_over_tp(parallel.sequence_parallel)
        if parallel.zero and case.is_sharded([parameter]):
            group = "tp" if is_partial else None
        elif parameter.is_expert:
            group = "edp"
        else:
            group = "stage" if is_partial else "replica"
        groups = [group, "pp" if parameter.is_over_depth else None]
        sums = sum(name is not None and case.size(name) > 1 for name in groups)
        total += sums * count * case.shard_bytes(parameter)
    return total


# --- Experts of other ranks -----------------------------------------------------------------------


def _copied_experts(case: MemoryCase) -> int:
    """As many as a rank may hold, and as many that leave it, as owners do in the mean. Gradients are summed until the last
    micro-step, then they go home layer by layer: those of one are summed while those of two are on their way."""
    placement, moe = case.config.placement, case.config.model.moe
    if not placement.makes_copies or case.axes["ep"] == 1:
        return 0
    one = placement.most_copies * 3 * case.config.model.d_row * moe.d_expert // case.axes["etp"]
    layers = sum(case.is_moe(layer) for layer in case.layers)
    at_once = min(2, layers)
    kept = at_once if placement.release else layers
    summed = min(3, layers) if placement.release or case.micro_steps == 1 else layers
    return one * ((kept + 1) * case.width + FP32 * (summed + 2 * at_once))


# --- What a micro-batch leaves --------------------------------------------------------------------


def _by_stage(case: MemoryCase) -> Iterator[tuple[int, int]]:
    """(stage, micro-batches in flight)."""
    return zip(case.own_stages, case.in_flight, strict=True)


def _own_kinds(case: MemoryCase) -> set[int]:
    """A layer of each."""
    return {layer for stage in case.own_stages for layer in case.kinds(stage)}


def _activations(case: MemoryCase) -> int:
    recompute = case.config.train.recompute
    of_kind = {kind: case.block_bytes(kind, recompute) for kind in _own_kinds(case)}
    kept = sum(
        in_flight * sum(count * of_kind[kind] for kind, count in case.kinds(stage).items())
        for stage, in_flight in _by_stage(case)
    )
    # Of short sequences nothing leaves, where each micro-batch has its own ratio.
    ratio = case.config.train.offload_ratio or 0.0
    return kept - round(away_bytes(_may_leave(case), ratio))


def _may_leave(case: MemoryCase) -> list[tuple[list[float], int]]:
    """(of each block, micro-batches in flight) of each stage: what a block keeps, but for decisions, where these are all that is
    kept beside its input, and for what another stage sent."""
    recompute = case.config.train.recompute
    stages = []
    for stage, in_flight in _by_stage(case):
        kinds = [case.first_alike[layer] for layer in case.stages[stage]]
        if recompute == "layer":
            blocks = [float(case.residual_bytes)] * len(kinds)
        else:
            of_kind = {kind: case.block_bytes(kind, recompute) for kind in set(kinds)}
            blocks = [float(of_kind[kind]) for kind in kinds]
        if stage:
            blocks[0] -= case.residual_bytes
        stages.append((blocks, in_flight))
    return stages


def _casts(case: MemoryCase) -> int:
    """Of matrices, but for the embedding and the router; what is made again casts again."""
    model, train = case.config.model, case.config.train
    if train.dtype == "fp32":
        return 0
    head = model.vocab_size * model.d_model // case.axes["tp"]
    joins = model.mtp_depth * 2 * model.d_model * model.d_model
    elements = 0
    for stage, in_flight in _by_stage(case):
        recompute = train.recompute
        of_layers = sum(
            count * _cast(case, kind, recompute) for kind, count in case.kinds(stage).items()
        )
        is_last = stage == len(case.stages) - 1
        elements += in_flight * (of_layers + is_last * (head + joins))
    return BF16 * elements


def _cast(case: MemoryCase, layer: int, recompute: Recompute) -> int:
    """Elements of a layer that stay cast to its backward."""
    model, axes = case.config.model, case.axes
    again = _MADE_AGAIN[recompute]
    if "layer" in again:
        return 0
    heads = model.total_heads + model.total_kv_heads
    attention = 2 * model.d_model * model.resolved_head_dim * heads // axes["tp"]
    if case.is_moe(layer):
        moe = model.moe_of(layer)
        routed = moe.num_experts * moe.d_expert // (axes["ep"] * axes["etp"])
        shared = moe.num_shared_experts * moe.d_expert
        made_again = 3 * (model.d_row * routed + model.d_model * shared)
        kept = 2 * model.d_model * (moe.d_latent or 0)
        feed_forward = kept + (0 if "moe" in again else made_again)
    else:
        feed_forward = 3 * model.d_model * model.d_ffn // axes["tp"]
        if case.has_memory(layer):
            feed_forward += model.d_model * (
                model.memory_layers.d_pre + model.memory_layers.d_value
            )
    return feed_forward + (0 if "attention" in again else attention)


def _boundaries(case: MemoryCase) -> int:
    """A received input is also its stage's first activation, which _activations has."""
    if case.config.parallel.pp == 1:
        return 0
    last = len(case.stages) - 1
    micro_batches = sum(
        case.micro_steps * ((stage > 0) + (stage < last))
        + in_flight * ((stage < last) - (stage > 0))
        for stage, in_flight in _by_stage(case)
    )
    return micro_batches * case.residual_bytes


def _logits(case: MemoryCase) -> int:
    """The last norm, what enters the head, fp32 logits; on one GPU torch's loss keeps log-probabilities too.

    As often for each depth of multi-token prediction, and what its join keeps: the token's norm, from bf16 what enters
    the hidden state's, which in fp32 is what entered the head, its own numbers, and both side by side.
    """
    if not case.has_last:
        return 0
    in_flight, ahead = case.in_flight[-1], case.config.model.mtp_depth
    normed = case.residual_bytes + FP32 * case.norm_tokens
    entered = case.width * case.norm_tokens * case.config.model.d_model
    head = normed + entered + _logit_bytes(case) * (1 + _torch_loss(case))
    hidden = FP32 * case.norm_tokens + (case.residual_bytes if case.width == BF16 else 0)
    join = normed + hidden + 2 * entered
    return in_flight * ((1 + ahead) * head + ahead * join)


def _logit_bytes(case: MemoryCase) -> int:
    return FP32 * case.tokens * (case.config.model.vocab_size // case.axes["tp"])


def _torch_loss(case: MemoryCase) -> bool:
    return case.on_gpu and case.axes["tp"] == 1


# --- What one block needs for a moment ------------------------------------------------------------


def _head_work(case: MemoryCase) -> int:
    """The gradient of the logits, in the compute type too; that of the matrix."""
    if not case.has_last:
        return 0
    model = case.config.model
    copies = (1 + model.mtp_depth) * (1 + _torch_loss(case))
    cast = _logit_bytes(case) // 2 if case.width == BF16 else 0
    matrix = case.width * model.vocab_size * model.d_model // case.axes["tp"]
    return _logit_bytes(case) * copies + cast + matrix


def _layer_work(case: MemoryCase, layer: int) -> int:
    """What is made again; gradients of the residual stream twice, of rows, of the hidden ones, of a matrix.

    The gradient of the logits is gone by then, and so are they.
    """
    train, model, axes = case.config.train, case.config.model, case.axes
    kept = case.block_bytes(layer, "none")
    levels = _MADE_AGAIN[train.recompute]
    again = max((kept - case.block_bytes(layer, level) for level in levels), default=0)
    if case.width == BF16:
        again += BF16 * (_cast(case, layer, "none") - _cast(case, layer, train.recompute))
    if case.is_moe(layer):
        moe = model.moe_of(layer)
        sent = case.own_tokens * moe.top_k
        received = int(case.activations(layer, "none").rows)
        widest, num_classes = max(moe.widths), len(moe.widths)  # one after the other
        hidden = 3 * widest * received // (axes["etp"] * num_classes)
        rows = model.d_row * (sent + 2 * received) + hidden
        experts = moe.num_experts // (axes["ep"] * num_classes)
        matrix = 2 * model.d_row * (widest // axes["etp"]) * experts
    else:
        rows = case.tokens * 3 * model.d_ffn // axes["tp"]
        matrix = 2 * model.d_model * model.d_ffn // axes["tp"]
    freed = _logit_bytes(case) if case.has_last else 0
    made = case.width * (rows + matrix)
    if case.has_memory(layer):
        made = max(made, _memory_work(case))
    return max(0, again + 2 * case.residual_bytes + made - freed)


def _memory_work(case: MemoryCase) -> int:
    """Gradients of a table, of several heads once more side by side; of the rows of pre-values, of the keys' scores."""
    memory = case.config.model.memory_layers
    row = max(memory.d_pre, memory.d_value * (2 if memory.heads > 1 else 1))
    table = memory.num_keys**2 * row // case.axes["ep"]
    token = memory.top_k * memory.d_pre + 2 * memory.rank * memory.num_keys
    return FP32 * (table + case.own_tokens * token)


# --- Host -----------------------------------------------------------------------------------------


def _host(case: MemoryCase) -> int:
    """What is copied to be saved, and of all that may leave the share that does: of long sequences all, where each has its own."""
    ratio = case.config.train.offload_ratio
    in_flight = sum(number * sum(blocks) for blocks, number in _may_leave(case))
    return _saved(case) + round((1.0 if ratio is None else ratio) * in_flight)


def _saved(case: MemoryCase) -> int:
    """Parameters and moments, each element written by one of the ranks that hold it."""
    if not case.config.checkpoint.asynchronous:
        return 0
    shares = (
        Fraction(count * case.shard_bytes(parameter), _copies(case, parameter))
        for count, parameter in case.counted_parameters
    )
    return round((1 + MOMENTS) * sum(shares))


def _copies(case: MemoryCase, parameter: Parameter) -> int:
    """Ranks that hold the same shard."""
    if case.config.parallel.zero:
        copies = case.size("edp_replicate" if parameter.is_expert else "dp_replicate")
    else:
        copies = case.size("edp" if parameter.is_expert else "replica")
    if parameter.is_over_depth:
        copies *= case.axes["pp"]
    return copies if parameter.is_expert or parameter.is_cut else copies * case.axes["tp"]
