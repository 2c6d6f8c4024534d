"""Bytes that a layer keeps from its forward for its backward, by formula. Derived term by term in docs/numerics.md.

T tokens of a tensor-parallel group in one micro-batch (the rank's own without tp), t = T / tp of them this rank's.
Residual stream, norms, routing and what enters a matrix are fp32; `activation_bytes` is the compute type's width.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from moesys.config.schema import ModelConfig, Recompute, RunConfig


def paper_layer_bytes(
    *,
    seq_len: int,
    samples: int,
    num_heads: int,
    d_model: int,
    tp: int = 1,
    sequence_parallel: bool = False,
    recompute: Literal["none", "selective", "full"] = "none",
) -> float:
    """The GPT layer of 2205.05198, Table 2: 2-byte activations, dropout, unfused attention, GELU."""
    sbh = seq_len * samples * d_model
    whole_over = tp if sequence_parallel else 1
    if recompute == "full":
        return 2 * sbh / whole_over
    scores = 0 if recompute == "selective" else 5 * num_heads * seq_len / d_model
    return sbh * (10 / whole_over + (24 + scores) / tp)


@dataclass(frozen=True, kw_only=True)
class ActivationCase:
    """One rank's part of a micro-batch of one layer."""

    model: ModelConfig
    tokens: int
    """T: of the whole tensor-parallel group, after context parallelism."""
    activation_bytes: Literal[2, 4] = 4
    """4 = fp32, 2 = bf16."""
    tp: int = 1
    sequence_parallel: bool = True
    ep: int = 1
    etp: int = 1
    recompute: Recompute = "none"
    received_rows: int | None = None
    """R, rows that this rank's experts serve; None = as many as under an even load."""

    @property
    def own_tokens(self) -> Fraction:
        """t, which this rank routes."""
        return Fraction(self.tokens, self.tp)

    @property
    def norm_tokens(self) -> Fraction:
        """Those that it norms and adds."""
        return self.own_tokens if self.tp > 1 and self.sequence_parallel else Fraction(self.tokens)

    @property
    def rows(self) -> Fraction:
        if self.received_rows is not None:
            return Fraction(self.received_rows)
        return self.own_tokens * self.model.moe.top_k * self.etp


def token_bytes(config: RunConfig) -> float:
    """Of a token, in all layers, on each rank of its tensor-parallel group; experts' load is even."""
    model, parallel, train = config.model, config.parallel, config.train
    return sum(
        block_bytes(
            ActivationCase(
                model=model.all_as(layer),
                tokens=parallel.tp,
                activation_bytes=train.compute_bytes,
                tp=parallel.tp,
                sequence_parallel=parallel.sequence_parallel,
                ep=parallel.ep,
                etp=parallel.etp,
                recompute=train.recompute,
            ),
            layer,
        )
        / parallel.tp
        for layer in range(model.total_layers)
    )


def block_bytes(case: ActivationCase, layer: int) -> float:
    """Of this layer."""
    if layer in case.model.moe_layers:
        return moe_block_bytes(case)
    has_memory = layer in case.model.memory_layers.layers
    return memory_block_bytes(case) if has_memory else dense_block_bytes(case)


def dense_block_bytes(case: ActivationCase) -> float:
    """x + attention(norm x), then x + SwiGLU(norm x)."""
    if case.recompute == "layer":
        return float(_residual(case))
    return float(2 * _norm(case) + _attention(case) + _ffn(case))


def memory_block_bytes(case: ActivationCase) -> float:
    """x + attention(norm x), then x + SwiGLU(norm x) + memory(norm x)."""
    if case.recompute == "layer":
        return float(_residual(case))
    return float(2 * _norm(case) + _attention(case) + _ffn(case) + _memory(case))


def moe_block_bytes(case: ActivationCase) -> float:
    """x + attention(norm x), then x + MoE(norm x), with the top-k softmax router and a z-loss."""
    if case.recompute == "layer":
        return float(_residual(case) + _routing(case) + _plan_replayed(case))
    return float(
        2 * _norm(case)
        + _attention(case)
        + 4 * case.own_tokens * case.model.d_model  # what the router reads
        + _routing(case)
        + _plan_saved(case)
        + _experts(case)
        + _shared(case)
        + _shared_gate(case)
        + _latent(case)
    )


def _residual(case: ActivationCase) -> Fraction:
    return 4 * case.norm_tokens * case.model.d_model


def _norm(case: ActivationCase) -> Fraction:
    """Its input, and one number per token."""
    return _residual(case) + 4 * case.norm_tokens


def _attention(case: ActivationCase) -> Fraction:
    """The input of wq, wk, wv; q, k, v and the output of softmax(q k^T) v, which is wo's input; one fp32 per row."""
    model, tokens, width = case.model, Fraction(case.tokens), case.activation_bytes
    if case.recompute in ("attention", "selective"):
        return 4 * case.norm_tokens * model.d_model  # what the norm gives
    entered = width * case.norm_tokens * model.d_model
    queries = Fraction(model.total_heads * model.resolved_head_dim, case.tp)
    keys = Fraction(model.total_kv_heads * model.resolved_head_dim, case.tp)
    return (
        entered
        + width * tokens * (2 * queries + 2 * keys)
        + 4 * tokens * Fraction(model.total_heads, case.tp)
        + (_attention_gate(case, queries) if model.attention_experts > 1 else 0)
        + (_qk_norm(case, queries + keys) if model.qk_norm else 0)
    )


def _attention_gate(case: ActivationCase, queries: Fraction) -> Fraction:
    """What it reads (in fp32 it is the input of wq); its softmax, and the same where tokens are gathered or cast; the
    outputs that it weighs, which are no longer wo's input."""
    model, tokens, width = case.model, Fraction(case.tokens), case.activation_bytes
    read = 4 * case.norm_tokens * model.d_model if width == 2 else Fraction(0)
    moved = width * tokens if width == 2 or case.norm_tokens < tokens else Fraction(0)
    probabilities = model.attention_experts * (4 * case.norm_tokens + moved)
    return read + probabilities + width * tokens * queries


def _qk_norm(case: ActivationCase, elements: Fraction) -> Fraction:
    """Inputs, and one number per head; from bf16, its fp32 copy and the normed one."""
    kept = 4 if case.activation_bytes == 4 else 8
    return case.tokens * elements * (kept + Fraction(4, case.model.resolved_head_dim))


def _ffn(case: ActivationCase) -> Fraction:
    """Input, gate and up, hidden."""
    hidden = Fraction(3 * case.model.d_ffn, case.tp)
    return case.activation_bytes * (case.norm_tokens * case.model.d_model + case.tokens * hidden)


def _memory(case: ActivationCase) -> Fraction:
    """What it reads, the queries before and after their norm, which keys and values; then its scores and its values."""
    memory, width, d_model = case.model.memory_layers, case.activation_bytes, case.model.d_model
    own = case.own_tokens
    # In fp32 the feed-forward's input, if it has these tokens; from bf16 once more for pre-values.
    read = 0 if width == 4 and case.norm_tokens == own else 4
    read += 2 if width == 2 and memory.d_pre else 0
    queries = 4 * (2 * 2 * memory.d_key + 2)
    ids = memory.top_k * (2 * 8 + 4 * case.ep)
    ids += (
        3 * 4 * memory.heads * case.ep
    )  # where each token's begin, and what else torch keeps of a bag
    values = width * memory.d_value
    return own * (d_model * read + queries + ids + _memory_scores(case) + values)


def _memory_scores(case: ActivationCase) -> int:
    """Per token: of a value its keys' scores and what the cores make of them, its weight; with pre-values these, what they
    are asked, and the gates."""
    memory = case.model.memory_layers
    of_value = 4 * memory.rank * (2 + memory.heads) + 4 * memory.heads * case.ep
    if memory.d_pre:
        of_value += 4 * (memory.d_pre + 2 + memory.heads)
    return memory.top_k * of_value + 4 * memory.d_pre


def _routing(case: ActivationCase) -> Fraction:
    """Logits and probabilities [E]; ids (int64), own and normalised weights [K]; two sums."""
    moe = case.model.moe
    return case.own_tokens * (8 * moe.num_choices + 16 * moe.top_k + 8)


def _plan_saved(case: ActivationCase) -> Fraction:
    """int64: the row of each slot; with sources and experts to sort by, both orders of the arrivals."""
    return 8 * case.own_tokens * case.model.moe.top_k + _arrival_orders(case)


def _plan_replayed(case: ActivationCase) -> Fraction:
    """And the slot of each row, which only a forward reads."""
    return _plan_saved(case) + 8 * case.own_tokens * case.model.moe.top_k


def _arrival_orders(case: ActivationCase) -> Fraction:
    sorts = case.ep * case.etp > 1 and case.model.moe.num_experts > case.ep
    return 2 * 8 * case.rows if sorts else Fraction(0)


def _experts(case: ActivationCase) -> Fraction:
    """Rows received; gate and up, hidden; rows sent back, whose products with the gradient are the weights'."""
    model, width = case.model, case.activation_bytes
    hidden = Fraction(3 * model.moe.d_expert, case.etp)
    if case.recompute in ("moe", "selective"):
        hidden = Fraction(0)
    sent_back = width * case.own_tokens * model.moe.top_k * model.d_row
    return width * case.rows * (model.d_row + hidden) + sent_back


def _shared(case: ActivationCase) -> Fraction:
    """Input in the compute type (in fp32 it is the router's), gate and up, hidden."""
    moe, width = case.model.moe, case.activation_bytes
    if not moe.num_shared_experts:
        return Fraction(0)
    entered = case.model.d_model if width == 2 else 0
    hidden = 3 * moe.num_shared_experts * moe.d_expert
    if case.recompute in ("moe", "selective"):
        hidden = 0
    return width * case.own_tokens * (entered + hidden)


def _shared_gate(case: ActivationCase) -> Fraction:
    """The branches that are weighed; scores in fp32, and from bf16 in the compute type. It reads what the router reads."""
    kind, width = case.model.moe.shared_gate, case.activation_bytes
    if kind == "none":
        return Fraction(0)
    number = 1 if kind == "sigmoid" else 2
    scores = 4 * number + (width * number if width == 2 else 0)
    return case.own_tokens * (width * number * case.model.d_model + scores)


def _latent(case: ActivationCase) -> Fraction:
    """Input in the compute type, if shared experts have not kept it; what is projected up again."""
    moe, width = case.model.moe, case.activation_bytes
    if moe.d_latent is None:
        return Fraction(0)
    entered = case.model.d_model if width == 2 and not moe.num_shared_experts else 0
    return width * case.own_tokens * (entered + moe.d_latent)
