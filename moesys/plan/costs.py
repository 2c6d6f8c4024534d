"""What a model costs, by formula: parameters and FLOPs. Pure integers.

A product of [m, k] by [k, n] counts 2 m k n. Attention counts the full S x S score matrix as
torch's FlopCounterMode does (causal masking is not subtracted). Backward is twice the forward.
"""

from collections.abc import Sequence
from fractions import Fraction

from moesys.config.schema import ModelConfig, MoEConfig


def attention_parameters(config: ModelConfig) -> int:
    """wq, wk, wv, wo of one layer and the gate of attention experts (norms not included)."""
    heads = config.total_heads + config.total_kv_heads
    gate = config.attention_experts if config.attention_experts > 1 else 0
    return config.d_model * (2 * config.resolved_head_dim * heads + gate)


def expert_parameters(config: ModelConfig) -> int:
    """One routed expert; of several widths the mean."""
    return 3 * config.d_row * config.moe.d_expert


def shared_parameters(config: ModelConfig) -> int:
    """What all tokens of an MoE layer pass, but the router: shared experts and their gate, the latent projections,
    experts without a feed-forward."""
    moe, d_model = config.moe, config.d_model
    experts = moe.num_shared_experts * 3 * d_model * moe.d_expert
    gate = {"none": 0, "sigmoid": 1, "softmax": 2}[moe.shared_gate] * d_model
    null = 3 * moe.constant_experts * d_model
    return experts + gate + 2 * d_model * (moe.d_latent or 0) + null


def memory_parameters(config: ModelConfig) -> int:
    """Of a memory layer what all tokens use: queries, keys, cores, projections (not its feed-forward)."""
    memory = config.memory_layers
    projections = config.d_model * (2 * memory.d_key + memory.d_pre + memory.d_value)
    keys = 2 * memory.rank * memory.num_keys * memory.d_key + memory.d_key
    return projections + keys + memory.heads * memory.rank**2


def value_parameters(config: ModelConfig) -> int:
    """One value of a memory, with its pre-value."""
    return config.memory_layers.d_value + config.memory_layers.d_pre


def norm_parameters(config: ModelConfig) -> int:
    """All norms of the model, but those of memory queries."""
    per_layer = 2 * config.d_model + (2 * config.resolved_head_dim if config.qk_norm else 0)
    return config.total_layers * per_layer + (1 + 3 * config.mtp_depth) * config.d_model


def join_parameters(config: ModelConfig) -> int:
    """The matrix of one depth of multi-token prediction that joins token and hidden state."""
    return 2 * config.d_model * config.d_model


def routed_experts(moe: MoEConfig) -> Fraction:
    """Of a token on average: top_k, less its even share of experts without a feed-forward."""
    return Fraction(moe.top_k * moe.num_experts, moe.num_choices)


def _router_parameters(
    config: ModelConfig, layer: int, router_parameters: Sequence[int] | None
) -> int:
    """Of a linear router one row per expert; routers of another kind say their own counts."""
    if router_parameters is None:
        return config.moe_of(layer).num_choices * config.d_model
    return router_parameters[config.moe_layers.index(layer)]


def _outer_parameters(config: ModelConfig, router_parameters: Sequence[int] | None) -> int:
    """All but routed experts and memories' values."""
    embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    dense_layers = config.total_layers - len(config.moe_layers)
    dense = dense_layers * 3 * config.d_model * config.d_ffn
    moe = sum(
        shared_parameters(config) + _router_parameters(config, layer, router_parameters)
        for layer in config.moe_layers
    )
    attention = config.total_layers * attention_parameters(config)
    joins = config.mtp_depth * join_parameters(config)
    memories = len(config.memory_layers.layers) * memory_parameters(config)
    return embeddings + attention + dense + moe + memories + joins + norm_parameters(config)


def _parameters_over_depth(config: ModelConfig, router_parameters: Sequence[int] | None) -> int:
    """Of what all MoE layers have one of."""
    if config.share_depth == "none" or not config.moe_layers:
        return 0
    router = _router_parameters(config, config.moe_layers[0], router_parameters)
    moe = config.moe.num_experts * expert_parameters(config) + shared_parameters(config) + router
    return moe + (attention_parameters(config) if config.share_depth == "all" else 0)


def total_parameters(config: ModelConfig, router_parameters: Sequence[int] | None = None) -> int:
    """All trained parameters. `router_parameters` of each MoE layer; None = linear routers'."""
    experts = sum(config.moe_of(layer).num_experts for layer in config.moe_layers)
    memory = config.memory_layers
    values = len(memory.layers) * memory.num_keys**2 * value_parameters(config)
    routed = experts * expert_parameters(config)
    of_layers = _outer_parameters(config, router_parameters) + routed + values
    further_layers = max(0, len(config.moe_layers) - 1)
    return of_layers - further_layers * _parameters_over_depth(config, router_parameters)


def active_parameters(config: ModelConfig, router_parameters: Sequence[int] | None = None) -> int:
    """Parameters that take part for one token: its routed experts, its values, everything else; what layers share counts
    in each."""
    routed = sum(routed_experts(config.moe_of(layer)) for layer in config.moe_layers)
    values = len(config.memory_layers.layers) * config.memory_layers.top_k
    chosen = int(routed * expert_parameters(config)) + values * value_parameters(config)
    return _outer_parameters(config, router_parameters) + chosen


def forward_flops_per_token(
    config: ModelConfig, seq_len: int, router_parameters: Sequence[int] | None = None
) -> int:
    """FLOPs of one token's forward in a sequence of `seq_len`: products of active weights, scores, head, and in
    training multi-token prediction.

    Exact for a linear router; another kind counts as products of its parameters.
    """
    of_layers = sum(
        layer_flops_per_token(config, layer, seq_len, router_parameters)
        for layer in range(config.num_layers)
    )
    return of_layers + after_layers_flops_per_token(config, seq_len, router_parameters)


def layer_flops_per_token(
    config: ModelConfig, layer: int, seq_len: int, router_parameters: Sequence[int] | None = None
) -> int:
    """The forward share of one layer; of a memory without the choice among its values, which has no backward."""
    if layer not in config.moe_layers:
        feed_forward = 3 * config.d_model * config.d_ffn
        if layer in config.memory_layers.layers:
            feed_forward += _memory_products(config)
    else:
        routed = int(routed_experts(config.moe_of(layer)) * expert_parameters(config))
        router = _router_parameters(config, layer, router_parameters)
        feed_forward = routed + shared_parameters(config) + router
    scores = 2 * config.total_heads * config.resolved_head_dim * seq_len
    return 2 * (attention_parameters(config) + feed_forward + scores)


def _memory_products(config: ModelConfig) -> int:
    """Multiplications of a token: projections, keys, the cores' scores of its values, the values themselves."""
    memory = config.memory_layers
    shared = memory_parameters(config) - memory.d_key - memory.heads * memory.rank**2
    scores = memory.heads * memory.rank * (memory.rank + 1)
    return shared + memory.top_k * (scores + value_parameters(config))


def head_flops_per_token(config: ModelConfig) -> int:
    """The forward share of the output matrix."""
    return 2 * config.vocab_size * config.d_model


def after_layers_flops_per_token(
    config: ModelConfig, seq_len: int, router_parameters: Sequence[int] | None = None
) -> int:
    """The forward share of what comes after the decoder's layers: the head, and all of multi-token prediction."""
    ahead = sum(
        layer_flops_per_token(config, layer, seq_len, router_parameters)
        + 2 * join_parameters(config)
        for layer in range(config.num_layers, config.total_layers)
    )
    return ahead + (1 + config.mtp_depth) * head_flops_per_token(config)


def training_flops_per_token(
    config: ModelConfig, seq_len: int, router_parameters: Sequence[int] | None = None
) -> int:
    """Forward and backward."""
    return 3 * forward_flops_per_token(config, seq_len, router_parameters)
