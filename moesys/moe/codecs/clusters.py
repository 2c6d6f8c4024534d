"""Tokens that share a row, their mean, and get back what the experts made of it.

Shapes: T tokens on this rank, D model, K experts per token, E experts, N = T * K slots, C rows (clusters), X numbers of a token's
sketch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesys.moe.codecs.slopes import (
    fitted_slopes,
    mean_square_residual,
    rows_of_pairs,
    with_probes,
)
from moesys.ops.clusters import ClusterOrder, SlotsByCode, member_means, restore

Compensation = Literal["residual", "none", "slope"]
_SLOPES = {"residual": 1.0, "none": 0.0}
_NEAREST = 0.5
"""Of the root mean square of residuals: what is nearer than that gives no slope."""


@dataclass(frozen=True, kw_only=True)
class ClusterCode:
    """Which slots share a row."""

    order: ClusterOrder
    ids_C1: Tensor
    compensation: Compensation
    is_detached: bool
    pairs_E2: Tensor | None = None
    """With slopes: the two rows of each expert that they are found from, -1 = none,"""
    least_square: Tensor | None = None
    """if they are so far apart."""

    @classmethod
    def of(
        cls,
        by_code: SlotsByCode,
        is_first_N: Tensor,
        sketch_TX: Tensor,
        compensation: Compensation,
        is_detached: bool,
    ) -> "ClusterCode":
        """Of rows that begin where `is_first_N` says, in order of code; sketches fp32, random maps of the tokens. One
        device-to-host sync of two integers."""
        slots_E2 = None
        if compensation == "slope":
            is_first_N, slots_E2 = with_probes(by_code, is_first_N)
        order = by_code.in_order_of_slot(is_first_N)
        sizes = torch.stack([order.rows_per_expert_E.sum(), order.num_members]).tolist()
        order = order.trimmed(*sizes)
        pairs_E2, least_square = None, None
        if slots_E2 is not None:
            pairs_E2 = rows_of_pairs(slots_E2, order)
            # A map to X dimensions makes squares X times as large.
            residual = mean_square_residual(sketch_TX, order) / sketch_TX.shape[1]
            least_square = _NEAREST**2 * residual
        first_slots_C = order.member_slots_M[order.first_member_X[:-1]]
        return cls(
            order=order,
            ids_C1=by_code.topk_ids_TK.flatten()[first_slots_C][:, None],
            compensation=compensation,
            is_detached=is_detached,
            pairs_E2=pairs_E2,
            least_square=least_square,
        )

    def encode(self, x_TD: Tensor) -> Tensor:
        """The mean of each row's tokens."""
        return member_means(x_TD, self.order)

    def decode(self, out_CD: Tensor, rows_CD: Tensor, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """y[t] = sum_k w[t, k] (E(c) + slope (x[t] - c)): residual compensation (2411.08446, 3.2), of another slope for each
        expert."""
        means_CD = rows_CD.detach() if self.is_detached else rows_CD
        if self.pairs_E2 is None or self.least_square is None:
            slopes_C = weights_TK.new_full(rows_CD.shape[:1], _SLOPES[self.compensation])
        else:
            pairs = (self.pairs_E2, self.least_square)
            slopes_E = fitted_slopes(out_CD, rows_CD, *pairs, weights_TK.dtype)
            slopes_C = slopes_E[self.ids_C1[:, 0]]
        return restore(out_CD, means_CD, x_TD, weights_TK, slopes_C, self.order)


def check_compensation(compensation: str) -> None:
    """Raises ValueError."""
    if compensation not in ("slope", *_SLOPES):
        raise ValueError(f"compensation={compensation!r} must be residual, none or slope")


def centred(x_TD: Tensor) -> Tensor:
    """How each token differs from the mean of all. A token that is not finite stays the only one that is not."""
    if len(x_TD) == 0:
        return x_TD
    return (x_TD - x_TD.mean(0, dtype=torch.float32).nan_to_num(0, 0, 0)).to(x_TD.dtype)


class RandomMaps:
    """[D, X], normal numbers: the same in every process, and the first of more dimensions."""

    def __init__(self, d_model: int, dimensions: int, seed: int, layer: int) -> None:
        self._shape = (dimensions, d_model)
        self._seed = (seed << 20) + layer
        self._maps: Tensor | None = None

    def like(self, x_TD: Tensor) -> Tensor:
        """Of x's type and place."""
        if self._maps is None or self._maps.device != x_TD.device or self._maps.dtype != x_TD.dtype:
            generator = torch.Generator().manual_seed(self._seed)
            self._maps = torch.randn(self._shape, generator=generator).T.contiguous().to(x_TD)
        return self._maps
