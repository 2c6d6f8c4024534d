"""Tokens that are near each other travel as their mean: each expert's are halved until they are near enough.

Shapes: T tokens on this rank, D model, K experts per token, E experts, X numbers of a token's sketch.
"""

import torch
from torch import Tensor, nn

from moesys.moe.codecs.clusters import (
    ClusterCode,
    Compensation,
    RandomMaps,
    centred,
    check_compensation,
)
from moesys.ops.clusters import slots_by_code
from moesys.ops.halves import halve


class TreeCodec(nn.Module):
    """As LshCodec, but rows are not those of hashes: an expert's tokens are cut in two across the direction in which they differ
    most, by their random sketches, and the parts again, until each keeps to the error bound (trees that adapt to what lies near
    each other: Dasgupta and Freund, 2008). So many rows as hashes would make are nearer to their tokens.
    """

    def __init__(
        self,
        *,
        d_model: int,
        layer: int = 0,
        dimensions: int = 32,
        error_bound: float = 0.3,
        compensation: Compensation = "slope",
        detach_residual: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            dimensions: X of the sketches, at least 1.
            error_bound: the root mean square of a row's residuals is at most so much of that of all tokens' differences from
                their mean, by their sketches.
            compensation: residual = a token's result is moved by how far it is from its row; none = it is its row's; slope =
                moved by so much of that as an expert's results move, found from one row more for each expert.
            detach_residual: no gradient to a row through what it is taken from.
            seed: of the maps, with the layer's number.
        """
        super().__init__()
        if dimensions < 1:
            raise ValueError(f"dimensions={dimensions} must be at least 1")
        if error_bound <= 0:
            raise ValueError(f"error_bound={error_bound} must be above 0")
        check_compensation(compensation)
        self.error_bound, self.detach_residual = error_bound, detach_residual
        self.compensation: Compensation = compensation
        self._maps = RandomMaps(d_model, dimensions, seed, layer)

    @torch.no_grad()
    def plan(self, x_TD: Tensor, topk_ids_TK: Tensor, num_experts: int) -> ClusterCode:
        """One device-to-host sync of two integers on a CPU, on a GPU one more for each halving."""
        sketch_TX = (centred(x_TD) @ self._maps.like(x_TD)).float()
        most = self.error_bound**2 * sketch_TX.square().sum(1).mean()
        codes_TK = halve(sketch_TX, topk_ids_TK, num_experts, most)
        by_code = slots_by_code(topk_ids_TK, codes_TK, num_experts)
        is_first_N = by_code.is_new(by_code.codes_N)
        how = (self.compensation, self.detach_residual)
        return ClusterCode.of(by_code, is_first_N, sketch_TX, *how)
