"""How long pieces of sequences take on the ranks that share them, and a plan as a whole. Pure.

Shapes: S sequences, R ranks, M micro-steps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moesys.config.schema import ModelConfig
from moesys.plan.batch.plan import BatchPlan, MicroStep
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
    """A piece, however short: kernels are started for it."""
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
        size = np.asarray(sizes, dtype=np.float64)
        return self.work_s(lengths) / size + self.piece_s + self.waited_s(lengths, size)

    def waited_s(self, lengths: ArrayLike, sizes: ArrayLike) -> Amounts:
        """For keys: a block of them that goes around is under way while the rank works on the one before it, and what it takes
        longer is waited for."""
        size = np.asarray(sizes, dtype=np.float64)
        block_s = self.block_token_s * np.asarray(lengths) / size + self.hop_s
        under_s = self.attention_s(lengths) / size**2
        return (size - 1) * np.maximum(0.0, block_s - under_s)


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


def rank_seconds(plan: BatchPlan, costs: BatchCosts) -> Amounts:
    """fp64 [M, R]: seconds of each rank's own work in each micro-step."""
    busy_MR = np.zeros((len(plan.micro_steps), plan.num_ranks))
    for index, step in enumerate(plan.micro_steps):
        for piece, piece_s in zip(step, _piece_seconds(plan, step, costs), strict=True):
            busy_MR[index, list(piece.ranks)] += piece_s
    return busy_MR + costs.micro_step_s * (busy_MR > 0)


def _piece_seconds(plan: BatchPlan, step: MicroStep, costs: BatchCosts) -> list[float]:
    """Of each piece on each of its ranks."""
    sequences = [piece.sequence for piece in step]
    sizes = [len(piece.ranks) for piece in step]
    return costs.rank_s(plan.lengths_S[sequences], sizes).tolist()


def in_step_s(busy_MR: Amounts) -> float:
    """Of a batch whose ranks meet in every layer, as they do for experts: each micro-step takes as long as its slowest rank."""
    return float(busy_MR.max(1).sum()) if busy_MR.size else 0.0


def free_s(plan: BatchPlan, costs: BatchCosts) -> float:
    """Of a batch whose ranks meet in rings alone."""
    pieces = (
        zip((piece.ranks for piece in step), _piece_seconds(plan, step, costs), strict=True)
        for step in plan.micro_steps
    )
    return free_pieces_s(pieces, plan.num_ranks, costs.micro_step_s)


def free_pieces_s(
    micro_steps: Iterable[Iterable[tuple[Sequence[int], float]]],
    num_ranks: int,
    micro_step_s: float,
) -> float:
    """The same of the ranks and the seconds of pieces: one begins when all of its ranks have ended those before it."""
    free_at = [0.0] * num_ranks
    for step in micro_steps:
        pieces = list(step)
        for rank in {rank for ranks, _ in pieces for rank in ranks}:
            free_at[rank] += micro_step_s
        for ranks, piece_s in pieces:
            end_s = max([free_at[rank] for rank in ranks]) + piece_s
            for rank in ranks:
                free_at[rank] = end_s
    return max(free_at, default=0.0)
