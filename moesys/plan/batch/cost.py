"""How long pieces of sequences take on the ranks that share them. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moesys.config.schema import ModelConfig
from moesys.plan.costs import training_flops_per_token
from moesys.plan.placement import Amounts


@dataclass(frozen=True, kw_only=True)
class AttentionKind:
    """Layers whose attention costs alike."""

    pair_s: float
    """A query with a key, in all of these layers and heads, forward and backward."""
    window: int | None = None
    """Keys that a query sees, itself among them; None = all before it."""

    def seconds(self, lengths: ArrayLike) -> Amounts:
        """Of whole causal sequences."""
        n = np.asarray(lengths, dtype=np.float64)
        w = n if self.window is None else np.minimum(n, self.window)
        return self.pair_s * (n * w - w * (w - 1) / 2)


@dataclass(frozen=True, kw_only=True)
class BatchCosts:
    """Forward and backward, on a rank with all layers or with those of a pipeline's slowest stage."""

    attention: tuple[AttentionKind, ...]
    token_s: float
    """A token, in all that is not attention between tokens."""
    piece_s: float = 0.0
    """A piece with the keys of one rank, however short: kernels are started for it."""
    micro_step_s: float = 0.0
    """A micro-step with tokens, beside its pieces."""
    block_token_s: float = 0.0
    """The keys and values of a token, and gradients back, from one rank of a ring to the next, in all layers."""
    hop_s: float = 0.0
    """From one rank of a ring to the next, beside its bytes, in all layers."""

    def work_s(self, lengths: ArrayLike) -> Amounts:
        """Of whole sequences on one rank, without what a piece costs."""
        return self.attention_s(lengths) + self.token_s * np.asarray(lengths, dtype=np.float64)

    def attention_s(self, lengths: ArrayLike) -> Amounts:
        """Of `work_s` what is between tokens."""
        return sum((kind.seconds(lengths) for kind in self.attention), np.zeros(np.shape(lengths)))

    def rank_s(self, lengths: ArrayLike, sizes: ArrayLike) -> Amounts:
        """Of pieces on each of so many ranks, with what these wait for keys."""
        return self.own_s(lengths, sizes) + self.waited_s(lengths, sizes)

    def own_s(self, lengths: ArrayLike, sizes: ArrayLike) -> Amounts:
        """The same without waits."""
        size = np.asarray(sizes, dtype=np.float64)
        return self.work_s(lengths) / size + self.piece_s * np.minimum(size, lengths)

    def waited_s(self, lengths: ArrayLike, sizes: ArrayLike) -> Amounts:
        """For keys: a block of them that goes around is under way while the rank works on the one before it, and what it takes
        longer is waited for."""
        size = np.asarray(sizes, dtype=np.float64)
        return (size - 1) * np.maximum(0.0, self.hop_s + self.behind_s(lengths, size))

    def behind_s(self, lengths: ArrayLike, sizes: ArrayLike) -> Amounts:
        """By so much the keys of one rank take longer to move, beside the hop, than to work on; below 0 if less long."""
        size = np.asarray(sizes, dtype=np.float64)
        moved_s = self.block_token_s * np.asarray(lengths) / size
        return moved_s - self.attention_s(lengths) / size**2 - self.piece_s


def costs_of(
    model: ModelConfig,
    flops_per_s: float,
    *,
    bytes_per_s: float | None = None,
    hop_s: float = 0.0,
    key_bytes: int = 2,
) -> BatchCosts:
    """By formula: products of all layers at one rate, and what rings pass on at another (None = for free).

    A query with a key is 4 * heads * head_dim FLOPs a layer, of which causal attention does those that it may; backward is
    twice the forward.
    """
    width = model.total_heads * model.resolved_head_dim
    pair_flops = 3 * 4 * width * model.total_layers
    moved_bytes = block_token_bytes(model, key_bytes)
    return BatchCosts(
        attention=(AttentionKind(pair_s=pair_flops / flops_per_s),),
        token_s=training_flops_per_token(model, 0) / flops_per_s,
        block_token_s=moved_bytes / bytes_per_s if bytes_per_s else 0.0,
        hop_s=hop_s * model.total_layers,
    )


def block_token_bytes(model: ModelConfig, key_bytes: int) -> int:
    """Of a token, from one rank of a ring to the next, in all layers: keys and values in forward and backward, their gradients
    in fp32 beside."""
    keys = 2 * model.total_kv_heads * model.resolved_head_dim
    return model.total_layers * keys * (2 * key_bytes + 4)
