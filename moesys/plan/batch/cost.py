"""How long pieces of sequences take on the ranks that share them, and a plan as a whole. Pure.

Shapes: S sequences, P pieces of a micro-step, R ranks, M micro-steps.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moesys.config.schema import ModelConfig
from moesys.plan.batch.plan import BatchPlan, MicroStep
from moesys.plan.costs import training_flops_per_token
from moesys.plan.placement import Amounts, Integers


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
        return self._waited_s(lengths, self.attention_s(lengths), sizes)

    def waited_together_s(self, lengths: Integers, size: int) -> float:
        """The same of several sequences on the same ranks, whose keys go around as one block."""
        return float(self._waited_s(lengths.sum(), self.attention_s(lengths).sum(), size))

    def _waited_s(self, tokens: ArrayLike, attention_s: ArrayLike, sizes: ArrayLike) -> Amounts:
        size = np.asarray(sizes, dtype=np.float64)
        block_s = self.block_token_s * np.asarray(tokens) / size + self.hop_s
        return (size - 1) * np.maximum(0.0, block_s - np.asarray(attention_s) / size**2)


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


def piece_seconds(
    lengths_S: Integers, step: MicroStep, costs: BatchCosts
) -> tuple[Amounts, Amounts]:
    """fp64 [P], twice: what each piece of a micro-step takes each of its ranks, and of this what they wait for keys."""
    lengths_P = lengths_S[[piece.sequence for piece in step]]
    sizes_P = np.array([len(piece.ranks) for piece in step], dtype=np.int64)
    waited_P = costs.waited_s(lengths_P, sizes_P)
    rings: dict[tuple[int, ...], list[int]] = {}
    for at, piece in enumerate(step):
        if len(piece.ranks) > 1:
            rings.setdefault(piece.ranks, []).append(at)
    for ranks, places in rings.items():
        if len(places) > 1:
            lengths = lengths_P[places]
            waited_P[places] = (
                costs.waited_together_s(lengths, len(ranks)) * lengths / lengths.sum()
            )
    return costs.work_s(lengths_P) / sizes_P + costs.piece_s + waited_P, waited_P


def rank_seconds(plan: BatchPlan, costs: BatchCosts) -> Amounts:
    """fp64 [M, R]: seconds of each rank's own work in each micro-step."""
    busy_MR = np.zeros((len(plan.micro_steps), plan.num_ranks))
    for busy_R, step in zip(busy_MR, plan.micro_steps, strict=True):
        for piece, piece_s in zip(
            step, piece_seconds(plan.lengths_S, step, costs)[0].tolist(), strict=True
        ):
            if len(piece.ranks) == 1:
                busy_R[piece.ranks[0]] += piece_s
            else:
                busy_R[list(piece.ranks)] += piece_s
    return busy_MR + costs.micro_step_s * (busy_MR > 0)


def in_step_s(busy_MR: Amounts) -> float:
    """Of a batch whose ranks meet in every layer, as they do for experts: each micro-step takes as long as its slowest rank."""
    return float(busy_MR.max(1).sum()) if busy_MR.size else 0.0


def free_s(plan: BatchPlan, costs: BatchCosts) -> float:
    """Of a batch whose ranks meet in rings alone: those of a ring in every layer, so that they begin and end a micro-step
    together, with all that they have in it."""
    free_R = np.zeros(plan.num_ranks)
    for step, busy_R in zip(plan.micro_steps, rank_seconds(plan, costs), strict=True):
        for ranks in meeting(step):
            free_R[ranks] = free_R[ranks].max()
            busy_R[ranks] = busy_R[ranks].max()
        free_R += busy_R
    return float(free_R.max(initial=0.0))


def meeting(step: MicroStep) -> list[list[int]]:
    """Ranks that a micro-step's rings join, in one or over others."""
    joined: dict[int, list[int]] = {}
    for _, ranks in step:
        if len(ranks) > 1:
            others = {id(group): group for rank in ranks if (group := joined.get(rank))}
            whole = max(others.values(), key=len, default=[])
            for group in others.values():
                if group is not whole:
                    whole += group
                    joined.update(dict.fromkeys(group, whole))
            new = [rank for rank in ranks if rank not in joined]
            whole += new
            joined.update(dict.fromkeys(new, whole))
    return list({id(group): group for group in joined.values()}.values())
