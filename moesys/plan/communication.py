"""Bytes that a rank sends in one optimizer step, by formula. Derived row by row in docs/communication.md.

What a collective sends is the convention of profile/traffic.py, which counts the same bytes as they go.

T tokens of a tensor-parallel group in one micro-batch (after cp), t = T / tp of them this rank's, D model, n ranks of a
group. Residual stream, norms and routing are fp32, as are parameters and gradients; w is the compute type's width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from moesys.config.dispatch_schema import Wire, WireConfig
from moesys.plan.parameters import outer_parameters
from moesys.plan.rank import RankOfRun
from moesys.plan.rows import RowsSent, Ways

FP32 = 4
INT16 = 2
INT32 = 4
INT64 = 8
FP64 = 8


class Sent(NamedTuple):
    """What a rank sends in a step for one purpose."""

    group: str
    """An axis, or stage, replica, sequence, edp, world as parallel/mesh.py has them."""
    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all or send."""
    purpose: str
    bytes: Fraction


@dataclass(frozen=True, kw_only=True)
class CommunicationCase(RankOfRun):
    """A rank, and what its bytes depend on besides."""

    orders: Mapping[int, str] | None = None
    """With a pipeline and zero=3: of each of its stages, F and B in the order in which they run."""
    state_dim: int = 0
    """Numbers per token that routers hand on to the next stage."""
    ranks_per_node: int | None = None
    """As launched; None = one node."""

    @property
    def ep_per_node(self) -> int:
        """Ranks of an ep group on a node."""
        return min(self.axes["ep"], max(1, self._per_node // self.axes["etp"]))

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self._per_node)

    @property
    def _per_node(self) -> int:
        return self.config.dispatch.ranks_per_node or self.ranks_per_node or self.world_size

    def size(self, group: str) -> int:
        inside = self.ep_per_node
        by_node = {"ep_node": inside, "ep_rail": self.axes["ep"] // inside}
        return by_node[group] if group in by_node else super().size(group)

    def all_reduce(self, group: str, purpose: str, nbytes: int) -> Sent:
        """Each rank has `nbytes`."""
        n = self.size(group)
        return Sent(group, "all_reduce", purpose, Fraction(2 * (n - 1) * nbytes, n))

    def all_to_all(self, group: str, purpose: str, nbytes: int) -> Sent:
        """Each rank has `nbytes`, an equal part for each."""
        n = self.size(group)
        return Sent(group, "all_to_all", purpose, Fraction((n - 1) * nbytes, n))

    def all_gather(self, group: str, purpose: str, nbytes: int) -> Sent:
        """Each rank gives `nbytes`."""
        return Sent(group, "all_gather", purpose, Fraction((self.size(group) - 1) * nbytes))

    def reduce_scatter(self, group: str, purpose: str, nbytes: int) -> Sent:
        """Each rank keeps `nbytes` of the sum."""
        return Sent(group, "reduce_scatter", purpose, Fraction((self.size(group) - 1) * nbytes))


def communication(case: CommunicationCase, rows: Sequence[RowsSent] = ()) -> list[Sent]:
    """All that the rank sends, without what is nothing. `rows`: of each of its MoE layers and micro-steps, in any order."""
    parts = (
        *_tensor(case),
        *_context(case),
        *_pipeline(case),
        *(_sharded(case) if case.config.parallel.zero else ()),
        *_gradient_sums(case),
        *_experts(case, rows),
        *_memory_layers(case),
        *_balance(case),
        *_step(case),
    )
    return [sent for sent in parts if sent.bytes]


# --- tensors --------------------------------------------------------------------------------------


def _tensor(case: CommunicationCase) -> Iterator[Sent]:
    """Per micro-step: into and out of every region of cut matrices, and back."""
    if case.axes["tp"] == 1:
        return
    steps, recompute = case.micro_steps, case.config.train.recompute
    sequence_parallel = case.config.parallel.sequence_parallel
    for layer in case.layers:
        yield from _region(case, "attention", steps, again=recompute == "layer")
        yield from _attention_gate(case, steps)
        if not case.is_moe(layer):
            # The recomputation ends where nothing more is missing: before the last sum.
            yield from _region(case, "feed-forward", steps, again=False)
        if not sequence_parallel and (case.is_moe(layer) or case.has_memory(layer)):
            row = case.own_tokens * case.config.model.d_model
            # What an MoE layer gives is the last thing of a block, and not made again; what a memory gives is not.
            joins = steps * (1 + (recompute == "layer" and case.has_memory(layer)))
            yield case.all_gather("tp", "a layer's share of tokens", steps * FP32 * row)
            yield case.all_gather("tp", "a layer's share of tokens", joins * case.width * row)
    if case.has_first:
        yield from _leave(case, "embedding", steps, steps, FP32)
    if case.has_last:
        ahead = case.config.model.mtp_depth
        yield from _leave(case, "embedding", steps * ahead, steps * ahead, FP32)
        yield from _enter(case, "head", steps * (1 + ahead))
        # The largest, then two sums: of exponentials and of the target's logit.
        yield case.all_reduce("tp", "cross-entropy", (1 + ahead) * steps * 3 * FP32 * case.tokens)


def _region(case: CommunicationCase, purpose: str, steps: int, again: bool) -> Iterator[Sent]:
    """`again`: its end is recomputed too."""
    yield from _enter(case, purpose, steps)
    yield from _leave(case, purpose, steps * (1 + again), steps, case.width)


def _enter(case: CommunicationCase, purpose: str, steps: int) -> Iterator[Sent]:
    """Tokens are gathered twice: forward, and for the matrices' gradients or by the recomputation before them."""
    share = case.width * case.own_tokens * case.config.model.d_model
    if case.config.parallel.sequence_parallel:
        yield case.all_gather("tp", purpose, 2 * steps * share)
        yield case.reduce_scatter("tp", purpose, steps * share)
    else:
        yield case.all_reduce("tp", purpose, steps * share * case.axes["tp"])


def _leave(
    case: CommunicationCase, purpose: str, forwards: int, backwards: int, width: int
) -> Iterator[Sent]:
    share = width * case.own_tokens * case.config.model.d_model
    if case.config.parallel.sequence_parallel:
        yield case.reduce_scatter("tp", purpose, forwards * share)
        yield case.all_gather("tp", purpose, backwards * share)
    else:
        yield case.all_reduce("tp", purpose, forwards * share * case.axes["tp"])


def _attention_gate(case: CommunicationCase, steps: int) -> Iterator[Sent]:
    """Probabilities of all tokens to the ranks of the heads, and the sums of their gradients."""
    experts = case.config.model.attention_experts
    if experts == 1:
        return
    share = FP32 * case.own_tokens * experts
    if case.config.parallel.sequence_parallel:
        again = case.config.train.recompute in ("attention", "selective", "layer")
        yield case.all_gather("tp", "attention gate", steps * (1 + again) * share)
        yield case.reduce_scatter("tp", "attention gate", steps * share)
    else:
        yield case.all_reduce("tp", "attention gate", steps * share * case.axes["tp"])


# --- sequences ------------------------------------------------------------------------------------


def _context(case: CommunicationCase) -> Iterator[Sent]:
    cp, model, parallel = case.axes["cp"], case.config.model, case.config.parallel
    if cp == 1:
        return
    head_dim, tp = model.resolved_head_dim, case.axes["tp"]
    query_heads, kv_heads = model.total_heads // tp, model.total_kv_heads // tp
    again = case.config.train.recompute in ("attention", "selective", "layer")
    times = case.micro_steps * len(case.layers)
    if parallel.cp_attention == "ring":
        elements = 2 * kv_heads * head_dim * case.tokens
        forward = (1 + again) * case.width * elements
        backward = (case.width + FP32) * elements
        nbytes = Fraction(times * (cp - 1) * (forward + backward))
        yield Sent("cp", "send", "keys and values", nbytes)
    else:
        heads = 2 * query_heads + 2 * max(kv_heads, cp)
        elements = heads * head_dim * case.tokens
        nbytes = Fraction(times * (cp - 1) * (2 + again) * case.width * elements, cp)
        yield Sent("cp", "all_to_all", "heads", nbytes)


# --- layers ---------------------------------------------------------------------------------------


def _pipeline(case: CommunicationCase) -> Iterator[Sent]:
    """Per micro-step and boundary: hidden states, the three routing losses, router state; back their gradients."""
    parallel = case.config.parallel
    tokens = case.own_tokens if parallel.sequence_parallel else case.tokens
    numbers = tokens * case.config.model.d_model + 3 + case.own_tokens * case.state_dim
    own, last = set(case.own_stages), len(case.stages) - 1
    forward = sum(stage < last and stage + 1 not in own for stage in own)
    backward = sum(stage > 0 and stage - 1 not in own for stage in own)
    nbytes = case.micro_steps * FP32 * numbers
    yield Sent("pp", "send", "hidden states and losses", Fraction(forward * nbytes))
    yield Sent("pp", "send", "their gradients", Fraction(backward * nbytes))


# --- parameters and gradients ---------------------------------------------------------------------


def _sharded(case: CommunicationCase) -> Iterator[Sent]:
    """What FSDP sends: parameters gathered, gradients reduced, by block and per step or micro-step."""
    zero = case.config.parallel.zero
    for stage in case.own_stages:
        num_moe = sum(map(case.is_moe, case.stages[stage]))
        for unit in case.units(stage):
            is_expert = unit[0].is_expert
            shard, replicate = (
                ("edp_shard", "edp_replicate") if is_expert else ("shard", "dp_replicate")
            )
            n = case.size(shard)
            padded, reduced = (
                FP32 * sum(parameter.padded_shard(n) for parameter in parameters)
                for parameters in (unit, [p for p in unit if num_moe or not p.is_over_depth])
            )
            purpose = "experts" if is_expert else "dense parameters"
            uses = num_moe if is_expert and unit[0].is_over_depth else 1
            gathers = _gathers(case, stage, uses)
            reduces = case.micro_steps if zero > 1 and case.config.parallel.pp == 1 else 1
            yield case.all_gather(shard, f"{purpose} gathered", gathers * padded)
            yield case.reduce_scatter(shard, f"{purpose}' gradients", reduces * reduced)
            yield case.all_reduce(replicate, f"{purpose}' gradients over copies", reduced)


def _gathers(case: CommunicationCase, stage: int, uses: int) -> int:
    """How often a step gathers a unit that a forward uses so often.

    Up to stage 2 it stays gathered from the first forward to the last backward, in which each use frees it. A recomputation finds it gathered for the backward.
    """
    if case.config.parallel.zero < 3:
        return uses if case.config.parallel.pp == 1 else min(uses, 1)
    if case.config.parallel.pp == 1:
        return case.micro_steps * 2 * uses
    # A pipeline's backwards leave it gathered, its forwards do not.
    assert case.orders is not None, "the order of a stage decides how often zero=3 gathers"
    return uses and sum(
        (uses if here == "F" else 1) - (before == "B")
        for before, here in pairwise(f"F{case.orders[stage]}")
    )


def _gradient_sums(case: CommunicationCase) -> Iterator[Sent]:
    """Once per step: what parallelize/gradients.py sums over ranks, which is all that FSDP does not."""
    parallel = case.config.parallel
    elements = dict.fromkeys(("edp", "replica", "stage", "tp"), 0)
    for parameter in case.parameters:
        is_partial = parameter.is_partial_over_tp(parallel.sequence_parallel)
        if parallel.zero:
            if is_partial:
                elements["tp"] += parameter.shard_of(
                    case.shard_rank(parameter), case.num_shards(parameter)
                )
        elif parameter.is_expert:
            elements["edp"] += parameter.size
        else:
            elements["stage" if is_partial else "replica"] += parameter.size
    for group, size in elements.items():
        yield case.all_reduce(group, "gradients", FP32 * size)
    copied = sum(
        p.shard_of(case.shard_rank(p), case.num_shards(p)) if parallel.zero else p.size
        for p in case.parameters
        if p.is_over_depth
    )
    yield case.all_reduce("pp", "gradients of what layers share", FP32 * copied)
    if case.config.model.has_two_tables and case.has_first != case.has_last:
        (table,) = outer_parameters(case.config.model, case.axes, has_table=True, has_last=False)
        size = table.size
        if parallel.zero:
            size = table.shard_of(case.shard_rank(table), case.num_shards(table))
        yield case.all_reduce("ends", "the gradient of a table of two", FP32 * size)


# --- experts --------------------------------------------------------------------------------------


def row_bytes(case: CommunicationCase) -> int:
    """Of one row that travels."""
    return case.width * case.config.model.d_row


def _experts(case: CommunicationCase, rows: Sequence[RowsSent]) -> Iterator[Sent]:
    """Rows go there and back, forward and backward; counts go ahead of them, but for padded ones."""
    train, moe, exchange = case.config.train, case.config.model.moe, case.config.dispatch.exchange
    ep, etp = case.axes["ep"], case.axes["etp"]
    if ep * etp == 1:
        return
    layers = case.micro_steps * len(case.moe_configs)
    if not (moe.capacity_factor and moe.capacity_policy == "pad"):
        experts = case.micro_steps * sum(moe.num_experts for moe in case.moe_configs)
        once = exchange == "deduplicated"
        counts = INT64 * experts // (case.size("ep_rail") if once else 1)
        yield case.all_to_all("ep_node" if once else "ep", "counts", counts)
        yield case.all_gather("etp", "counts", counts)
        if exchange == "hierarchical":
            yield case.all_gather("ep_node", "counts", layers * INT64 * ep)
    forwards = train.exchanging_forwards
    slices = (forwards + 1) * sum(r.copied + r.partial for r in rows)
    yield Sent("etp", "all_to_all", "rows", Fraction(slices * row_bytes(case)))
    wire = case.config.dispatch.wire
    if exchange == "flat":
        yield _rows(case, "ep", wire, [r.ep for r in rows], forwards)
        return
    if exchange == "hierarchical":
        yield _rows(case, "ep_node", wire, [r.inside for r in rows], forwards)
    else:
        yield case.all_to_all("ep_rail", "counts", layers * INT64 * case.size("ep_rail"))
        there, back = (sum(r.across[way] for r in rows) for way in range(2))
        numbers = INT16 * there + FP32 * (forwards * there + back)
        yield Sent("ep_rail", "all_to_all", "ids and weights", Fraction(moe.top_k * numbers))
        yield _rows(case, "ep_node", WireConfig(), [r.inside for r in rows], forwards)
    yield _rows(case, "ep_rail", wire, [r.across for r in rows], forwards)


def _rows(
    case: CommunicationCase, group: str, wire: WireConfig, ways: Sequence[Ways], forwards: int
) -> Sent:
    """Each of the four ways in its own format."""
    d_row = case.config.model.d_row

    def width(kind: Wire) -> int:
        return wire.row_bytes(kind, d_row, case.width)

    outward = forwards * width(wire.dispatch_forward) + width(wire.combine_backward)
    homeward = forwards * width(wire.combine_forward) + width(wire.dispatch_backward)
    nbytes = sum(way.there * outward + way.back * homeward for way in ways)
    return Sent(group, "all_to_all", "rows", Fraction(nbytes))


def _memory_layers(case: CommunicationCase) -> Iterator[Sent]:
    """All tokens' ids and scores to the columns of each rank, and what these give back: there, and backward."""
    memory, n = case.config.model.memory_layers, case.axes["ep"]
    if n == 1:
        return
    tokens = case.micro_steps * case.own_tokens * sum(map(case.has_memory, case.layers))
    forwards = case.config.train.exchanging_forwards
    chosen = tokens * memory.top_k
    moved = tokens * case.width * (memory.d_value + memory.d_pre)
    yield Sent("ep", "all_to_all", "memory", Fraction((forwards + 1) * moved * (n - 1), n))
    yield case.all_gather("ep", "memory", forwards * INT32 * chosen)
    scores = FP32 * chosen * memory.heads
    yield case.all_gather("ep", "memory", forwards * scores)
    yield case.reduce_scatter("ep", "memory", scores)
    if memory.d_pre:
        yield case.reduce_scatter("ep", "memory", forwards * FP32 * chosen)
        yield case.all_gather("ep", "memory", FP32 * chosen)


# --- the small ones -------------------------------------------------------------------------------


def _balance(case: CommunicationCase) -> Iterator[Sent]:
    """Per micro-step and MoE layer: slots per expert, counted over all that share them."""
    balance = case.config.model.moe.balance
    numbers = case.micro_steps * sum(moe.num_choices for moe in case.moe_configs)
    if balance.global_loss_coef or balance.device_loss_coef or balance.width_loss_coef:
        yield case.all_reduce("stage", "balance", INT64 * numbers)
    if balance.micro_loss_coef:
        yield case.all_reduce("sequence", "balance", INT64 * numbers)
    if balance.sequence_loss_coef:
        samples = case.config.train.micro_batch_tokens // case.config.data.seq_len
        yield case.all_reduce("sequence", "balance", FP32 * samples * numbers)


def _step(case: CommunicationCase) -> Iterator[Sent]:
    """Once per step, over all ranks."""
    model = case.config.model
    yield case.all_reduce("world", "gradient norm", FP64)
    num_moe = len(model.moe_layers)
    yield case.all_reduce("world", "expert load", INT64 * num_moe * (model.moe.num_choices + 1))
    has_codec = bool(case.config.dispatch.codecs) and case.axes["ep"] > 1
    numbers = 8 + num_moe * (2 if has_codec else 1)
    numbers += case.num_nodes if case.num_nodes > 1 else 0
    yield case.all_reduce("world", "the step's numbers", numbers * FP64)
