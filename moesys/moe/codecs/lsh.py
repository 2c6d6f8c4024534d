"""Tokens that are near each other travel as their mean (LSH-MoE, 2411.08446).

Shapes: T tokens on this rank, D model, K experts per token, N = T * K slots, C rows (clusters), H hashes of V dimensions each.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moesys.ops.clusters import (
    ClusterOrder,
    cluster_order,
    cross_polytope,
    member_means,
    restore,
    rows_by_prefix,
)

_MOST_BITS = 62
"""Of a code, an int64 that is not negative."""


@dataclass(frozen=True, kw_only=True)
class LshCode:
    """Which slots share a row."""

    order: ClusterOrder
    ids_C1: Tensor
    slope: float
    is_detached: bool

    def encode(self, x_TD: Tensor) -> Tensor:
        """The mean of each row's tokens."""
        return member_means(x_TD, self.order)

    def decode(self, out_CD: Tensor, rows_CD: Tensor, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """y[t] = sum_k w[t, k] (E(c) + slope (x[t] - c)): residual compensation (3.2)."""
        means_CD = rows_CD.detach() if self.is_detached else rows_CD
        slopes_C = weights_TK.new_full(rows_CD.shape[:1], self.slope)
        return restore(out_CD, means_CD, x_TD, weights_TK, slopes_C, self.order)


class LshCodec(nn.Module):
    """All slots of an expert whose tokens have the same H codes are one row; codes are those of a cross-polytope hash:
    code_h = the vertex of the cross-polytope that R_h x is nearest to, R_h a fixed random map to V dimensions (Eq. 3).

    The gradient of a token with residuals x - c: dx = g + (dc - sum of its row's g) / members, g of its weighted results;
    with `detach_residual` the middle of a row stands still: dx = g + dc / members.
    """

    def __init__(
        self,
        *,
        d_model: int,
        layer: int = 0,
        hashes: int = 6,
        dimensions: int = 8,
        most_rows: float = 1.0,
        compensation: Literal["residual", "none"] = "residual",
        detach_residual: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            hashes: H; more make more rows, nearer to their tokens.
            dimensions: V of each hash, 2 V codes.
            most_rows: share of the slots that may travel: a forward uses the first so many hashes as keep to it (the first
                is always used); 1 = all hashes.
            compensation: residual = a token's result is moved by how far it is from its row; none = it is its row's.
            detach_residual: no gradient to a row through what it is taken from.
            seed: of the maps, with the layer's number.
        """
        super().__init__()
        if min(hashes, dimensions) < 1:
            raise ValueError(f"hashes={hashes} and dimensions={dimensions} must be at least 1")
        if hashes * math.log2(2 * dimensions) > _MOST_BITS:
            raise ValueError(
                f"hashes={hashes} of dimensions={dimensions} make codes of {hashes * math.log2(2 * dimensions):.0f} bits, "
                f"which must be at most {_MOST_BITS}: use fewer"
            )
        if not 0 < most_rows <= 1:
            raise ValueError(f"most_rows={most_rows} must be above 0 and at most 1")
        self.hashes, self.dimensions, self.most_rows = hashes, dimensions, most_rows
        self.slope = 1.0 if compensation == "residual" else 0.0
        self.detach_residual = detach_residual
        self._generator_seed = (seed << 20) + layer
        self._shape = (d_model, hashes * dimensions)
        self._maps: Tensor | None = None

    @torch.no_grad()
    def plan(self, x_TD: Tensor, topk_ids_TK: Tensor, num_experts: int) -> LshCode:
        """One device-to-host sync of two integers, one more with `most_rows` below 1."""
        codes_T = self._codes(x_TD, topk_ids_TK, num_experts)
        order = cluster_order(topk_ids_TK, codes_T, num_experts)
        sizes = torch.stack([order.rows_per_expert_E.sum(), order.num_members]).tolist()
        order = order.trimmed(*sizes)
        first_slots_C = order.member_slots_M[order.first_member_X[:-1]]
        return LshCode(
            order=order,
            ids_C1=topk_ids_TK.flatten()[first_slots_C][:, None],
            slope=self.slope,
            is_detached=self.detach_residual,
        )

    def _codes(self, x_TD: Tensor, topk_ids_TK: Tensor, num_experts: int) -> Tensor:
        """int64 [T], of as many hashes as `most_rows` allows."""
        turned_THV = (x_TD @ self._turn(x_TD)).unflatten(1, (self.hashes, self.dimensions))
        base = 2 * self.dimensions
        codes_T = x_TD.new_zeros(x_TD.shape[0], dtype=torch.int64)
        for code_T in cross_polytope(turned_THV).unbind(1):
            codes_T = codes_T * base + code_T
        if self.most_rows == 1 or self.hashes == 1:
            return codes_T
        counts_H = rows_by_prefix(topk_ids_TK, codes_T, num_experts, base, self.hashes)
        allowed = self.most_rows * (topk_ids_TK >= 0).sum()
        used = max(1, int((counts_H <= allowed).sum()))  # counts rise with every hash
        return codes_T // base ** (self.hashes - used)

    def _turn(self, x_TD: Tensor) -> Tensor:
        """[D, H * V], of x's type and place; the same in every process."""
        if self._maps is None or self._maps.device != x_TD.device or self._maps.dtype != x_TD.dtype:
            generator = torch.Generator().manual_seed(self._generator_seed)
            self._maps = torch.randn(self._shape, generator=generator).to(x_TD)
        return self._maps
