"""How much of what layers keep for their backward may wait in host memory without being waited for (ByteScale, 2502.21231,
section 5.2), and how many tokens a rank then has memory for. Pure.

While a layer computes forward, a share r of what the layer before it keeps leaves for the host; while one computes backward, that
of the next to do so comes back. So two layers are on the device whole, the one that computes and the one on its way. Of l layers
that keep A bytes each it holds

    2 A + (1 - r) (l - 2) A    bytes at once, a share of 1 - r (l - 2) / l of all.

Nobody waits for a transfer that takes no longer than the layer it is under: with a forward of T seconds and a backward of 2 T, and
s seconds in which a layer's copies are begun, however small they are,

    s + r A / out <= T    and    s + r A / back <= 2 T,    so    r = min((T - s) out, (2 T - s) back) / A,    from 0 to 1.

A is linear in a sequence's tokens and T quadratic, so that long sequences may be away whole; ranks that share one divide both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from moesys.config.schema import ModelConfig
from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.fit import least_ranks
from moesys.plan.batch.timeline import SHARES
from moesys.plan.costs import layer_flops_per_token
from moesys.plan.zigzag import most_ring_tokens


@dataclass(frozen=True, kw_only=True)
class HostLink:
    """Between a device and host memory."""

    out_bytes_per_s: float
    """To the host."""
    back_bytes_per_s: float
    start_s: float = 0.0
    """In which the copies of a layer are begun, one way."""


@dataclass(frozen=True, kw_only=True)
class OffloadCosts:
    """What decides a micro-batch's ratio on one rank."""

    link: HostLink
    costs: BatchCosts
    """Of all layers, without what comes after them."""
    layers: int
    """l."""
    token_bytes: float
    """That they keep of a token (plan.activations.token_bytes)."""
    other_token_bytes: float = 0.0
    """That the device has for a token beside: its logits."""

    def hidden_ratio(self, lengths: ArrayLike, sizes: ArrayLike) -> float:
        """The largest that is not waited for, of a micro-batch: pieces of sequences, each on so many ranks; 0 of one without tokens."""
        n, size = np.asarray(lengths, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
        kept_bytes = self.token_bytes * float((n / size).sum())
        if not kept_bytes:
            return 0.0
        work_s = float((self.costs.work_s(n) / size).sum())
        start_s = self.layers * self.link.start_s
        out_bytes = (SHARES["forward"] * work_s - start_s) * self.link.out_bytes_per_s
        back_bytes = (SHARES["backward"] * work_s - start_s) * self.link.back_bytes_per_s
        return min(1.0, max(0.0, min(out_bytes, back_bytes) / kept_bytes))

    def resident_share(self, ratio: float) -> float:
        """Of all bytes of a token, the most that are on the device at once."""
        away = ratio * self.token_bytes * max(0, self.layers - 2) / self.layers
        return 1 - away / (self.token_bytes + self.other_token_bytes)

    def capacity_tokens(self, capacity_tokens: int, ratio: float) -> int:
        """As many as the device has memory for where it has it for `capacity_tokens` that stay."""
        return int(capacity_tokens / self.resident_share(ratio) * (1 + 1e-12))

    def ring(self, length: int, capacity_tokens: int) -> tuple[int, float]:
        """The fewest ranks that have memory for a sequence (ByteScale's D(s)), and its ratio on them: 0 where that saves no rank."""
        without = least_ranks(length, capacity_tokens)
        for size in range(1, without):
            ratio = self.hidden_ratio([length], [size])
            if most_ring_tokens(length, size) <= self.capacity_tokens(capacity_tokens, ratio):
                return size, ratio
        return without, 0.0


def layer_costs(model: ModelConfig, flops_per_s: float) -> BatchCosts:
    """As `plan.batch.cost.costs_of`, without the head: nothing leaves or comes back under that."""
    token_flops = sum(layer_flops_per_token(model, layer, 0) for layer in range(model.total_layers))
    pair_flops = 4 * model.total_heads * model.resolved_head_dim * model.total_layers
    return BatchCosts(
        attention=(AttentionKind(pair_s=3 * pair_flops / flops_per_s),),
        token_s=3 * token_flops / flops_per_s,
    )


def away_bytes(stages: Sequence[tuple[Sequence[float], int]], ratio: float) -> float:
    """On the host when a rank's device holds most: all but two blocks, one after the other, are away then; with micro-batches in
    flight all but one more of each stage, the next micro-batch's last, which is back when its backward begins.

    Args:
        stages: of each of the rank's, what may leave of each block's, one or more, and micro-batches in flight.
    """
    total = sum(in_flight * sum(blocks) for blocks, in_flight in stages)
    neighbours = [a + b for blocks, _ in stages for a, b in pairwise([*blocks, 0.0])]
    if sum(in_flight for _, in_flight in stages) > 1:
        neighbours.append(max(b[-1] for b, _ in stages) + max(b[0] for b, _ in stages))
    back = sum(blocks[-1] for blocks, in_flight in stages if in_flight > 1)
    return ratio * max(0.0, total - max(neighbours) - back)
