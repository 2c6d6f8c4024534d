"""Tokens that are near each other travel as their mean (LSH-MoE, 2411.08446).

Shapes: T tokens on this rank, D model, K experts per token, E experts, N = T * K slots, C rows (clusters), H hashes of V
dimensions each.
"""

import math

import torch
from torch import Tensor, nn

from moesys.moe.codecs.clusters import (
    ClusterCode,
    Compensation,
    RandomMaps,
    centred,
    check_compensation,
)
from moesys.moe.codecs.depth import within_error, within_share
from moesys.ops.clusters import SlotsByCode, cross_polytope, slots_by_code

_MOST_BITS = 62
"""Of a code, an int64 that is not negative."""
_NORM_BITS = 6


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
        centered: bool = True,
        most_rows: float = 1.0,
        error_bound: float | None = 0.35,
        norm_factor: float | None = None,
        compensation: Compensation = "slope",
        detach_residual: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            hashes: H; more make more rows, nearer to their tokens.
            dimensions: V of each hash, 2 V codes.
            centered: what a hash sees is how a token differs from the mean of this rank's: what all have in common says nothing
                of which are near each other.
            most_rows: share of the slots that may travel: a forward uses the first so many hashes as keep to it (the first
                is always used); 1 = all hashes. A slope's rows come on top.
            error_bound: each row uses the fewest hashes with which the root mean square of its tokens' residuals is at most
                so much of that of all tokens (of their differences from the mean, if centered), by their mapped lengths;
                what does not with all of them travels by itself. null = as `most_rows` says.
            norm_factor: tokens share a row only if their lengths lie between the same two powers of it; null = of any length.
            compensation: residual = a token's result is moved by how far it is from its row; none = it is its row's; slope =
                moved by so much of that as an expert's results move, found from one row more for each expert.
            detach_residual: no gradient to a row through what it is taken from.
            seed: of the maps, with the layer's number.
        """
        super().__init__()
        if min(hashes, dimensions) < 1:
            raise ValueError(f"hashes={hashes} and dimensions={dimensions} must be at least 1")
        bits = hashes * math.log2(2 * dimensions) + (0 if norm_factor is None else _NORM_BITS)
        if bits > _MOST_BITS:
            raise ValueError(
                f"hashes={hashes} of dimensions={dimensions} make codes of {bits:.0f} bits, "
                f"which must be at most {_MOST_BITS}: use fewer"
            )
        if not 0 < most_rows <= 1:
            raise ValueError(f"most_rows={most_rows} must be above 0 and at most 1")
        if error_bound is not None and error_bound < 0:
            raise ValueError(f"error_bound={error_bound} must be at least 0")
        if error_bound is not None and most_rows < 1:
            raise ValueError(
                f"error_bound={error_bound} and most_rows={most_rows} both say how many hashes count: "
                "add error_bound=null, or leave most_rows at 1"
            )
        if norm_factor is not None and norm_factor <= 1:
            raise ValueError(f"norm_factor={norm_factor} must be above 1")
        check_compensation(compensation)
        self.hashes, self.dimensions, self.centered = hashes, dimensions, centered
        self.most_rows, self.error_bound, self.norm_factor = most_rows, error_bound, norm_factor
        self.compensation: Compensation = compensation
        self.detach_residual = detach_residual
        self._maps = RandomMaps(d_model, hashes * dimensions, seed, layer)

    @torch.no_grad()
    def plan(self, x_TD: Tensor, topk_ids_TK: Tensor, num_experts: int) -> ClusterCode:
        """One device-to-host sync of two integers, one more with `most_rows` below 1."""
        codes_T, turned_TX = self._codes(x_TD)
        by_code = slots_by_code(topk_ids_TK, codes_T[:, None].expand_as(topk_ids_TK), num_experts)
        is_first_N = self._first_of_rows(by_code, turned_TX)
        how = (self.compensation, self.detach_residual)
        return ClusterCode.of(by_code, is_first_N, turned_TX.float(), *how)

    def _codes(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T], of all hashes; and what was hashed, [T, H * V]."""
        codes_T = self._lengths(x_TD)
        if self.centered:
            # Before the product, whose rounding in bf16 is of what all have in common.
            x_TD = centred(x_TD)
        turned_TX = x_TD @ self._maps.like(x_TD)
        vertices_TH = cross_polytope(turned_TX.unflatten(1, (self.hashes, self.dimensions)))
        for code_T in vertices_TH.unbind(1):
            codes_T = codes_T * self._base + code_T
        return codes_T, turned_TX

    def _first_of_rows(self, by_code: SlotsByCode, turned_TX: Tensor) -> Tensor:
        """Where rows begin, in order of code: of as many hashes as `most_rows` or `error_bound` say."""
        how = (by_code, self._base, self.hashes)
        if self.error_bound is not None:
            return within_error(*how, turned_TX, self.error_bound)
        if self.most_rows < 1:
            return within_share(*how, self.most_rows)
        return by_code.is_new(by_code.codes_N)

    @property
    def _base(self) -> int:
        """Of the digits of a code."""
        return 2 * self.dimensions

    def _lengths(self, x_TD: Tensor) -> Tensor:
        """int64 [T], below 2^_NORM_BITS: which powers of `norm_factor` a token's length lies between."""
        if self.norm_factor is None:
            return x_TD.new_zeros(x_TD.shape[0], dtype=torch.int64)
        middle = 2 ** (_NORM_BITS - 1)
        power_T = x_TD.float().norm(dim=1).log() / math.log(self.norm_factor)
        return power_T.floor().clamp(-middle, middle - 1).long() + middle
