"""How an expert's result moves with its token, found on the way: one token of an expert's largest row travels by itself, and

    slope = <E(x) - E(c), x - c> / |x - c|^2,    c the mean of the row's other tokens

is the least-squares fit of E(x) = E(c) + slope (x - c) along that line. Of a linear expert that only scales, it is the scale. What
rounding on the wire does to E is divided by |x - c|: two that are much nearer than tokens are to their rows give no slope.

Shapes: T tokens, K experts per token, E experts, N = T * K slots, C rows, D model; a pair is a token's row and the others'.
"""

import torch
import torch.nn.functional as F_
from torch import Tensor

from moesys.ops.clusters import ClusterOrder


def with_probes(codes_TK: Tensor, order: ClusterOrder, num_experts: int) -> tuple[Tensor, Tensor]:
    """Codes with which one slot of each expert's largest row, the first of equals, is a row by itself.

    Args:
        codes_TK: above -N.
        order: of `codes_TK`, not trimmed.

    Returns:
        codes_TK, and pairs_E2: that slot and the next of its row; -1 where no row has two. No host sync.
    """
    sizes_C = order.first_member_X.diff()
    num_rows = sizes_C.numel()
    if num_rows == 0:
        return codes_TK, codes_TK.new_full((num_experts, 2), -1)
    row_C = torch.arange(num_rows, device=sizes_C.device)
    expert_C = torch.searchsorted(order.rows_per_expert_E.cumsum(0), row_C, right=True)
    # The largest row, of equals the first; rows that are spare go to one expert more.
    rank_C = (sizes_C + 1) * num_rows - 1 - row_C
    best_E = rank_C.new_zeros(num_experts + 1).scatter_reduce(0, expert_C, rank_C, "amax")[:-1]
    has_two_E = best_E >= 2 * num_rows
    first_E = order.first_member_X[torch.where(has_two_E, num_rows - 1 - best_E % num_rows, 0)]
    pairs_E2 = order.member_slots_M[torch.stack([first_E, first_E + has_two_E], dim=1)]
    pairs_E2 = torch.where(has_two_E[:, None], pairs_E2, -1)
    alone_E = -1 - codes_TK.numel() - torch.arange(num_experts, device=codes_TK.device)
    codes_X = F_.pad(codes_TK.flatten(), (1, 0))  # the first takes what is no pair
    codes_X[pairs_E2[:, 0] + 1] = alone_E
    return codes_X[1:].view_as(codes_TK), pairs_E2


def rows_of_pairs(pairs_E2: Tensor, order: ClusterOrder) -> Tensor:
    """The rows of slots, [E, 2]; -1 = none."""
    return F_.pad(order.row_of_slot_TK.flatten(), (1, 0), value=-1)[pairs_E2 + 1]


@torch.no_grad()
def fitted_slopes(
    out_CD: Tensor, rows_CD: Tensor, pairs_E2: Tensor, least_square: Tensor
) -> Tensor:
    """[E], of least_square's type, no gradient: 0 for an expert without a pair of rows, or whose two are too near.

    Args:
        out_CD: what the experts made of `rows_CD`.
        pairs_E2: rows; -1 = none.
        least_square: of |x - c| of a pair, one number.
    """
    dtype = least_square.dtype
    if rows_CD.shape[0] == 0:
        return rows_CD.new_zeros(pairs_E2.shape[0], dtype=dtype)
    first_E, second_E = pairs_E2.clamp(min=0).unbind(1)
    moved_ED, apart_ED = (x[first_E].to(dtype) - x[second_E].to(dtype) for x in (out_CD, rows_CD))
    squares_E = apart_ED.square().sum(1)
    slopes_E = (moved_ED * apart_ED).sum(1) / squares_E
    return torch.where((squares_E > 0) & (squares_E >= least_square), slopes_E, 0.0)


@torch.no_grad()
def mean_square_residual(
    x_TD: Tensor, means_CD: Tensor, order: ClusterOrder, dtype: torch.dtype
) -> Tensor:
    """Of |x - c|^2, over the slots that share a row; one number of `dtype`, 0 where none does."""
    sizes_C = order.first_member_X.diff()
    slots_T = (order.row_of_slot_TK >= 0).sum(1)
    squares_T, squares_C = (x.to(dtype).square().sum(1) for x in (x_TD, means_CD))
    total = (slots_T * squares_T).sum() - (sizes_C * squares_C).sum()
    return total.clamp(min=0) / torch.where(sizes_C > 1, sizes_C, 0).sum().clamp(min=1)
