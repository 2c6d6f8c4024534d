"""How an expert's result moves with its token, found on the way: one token of an expert's largest row travels by itself, and

    slope = <E(x) - E(c), x - c> / |x - c|^2,    c the mean of the row's other tokens

is the least-squares fit of E(x) = E(c) + slope (x - c) along that line. Of a linear expert that only scales, it is the scale. What
rounding on the wire does to E is divided by |x - c|: two that are much nearer than tokens are to their rows give no slope.

Shapes: T tokens, K experts per token, E experts, N = T * K slots, C rows, D model; a pair is a token's row and the others'.
"""

import torch
import torch.nn.functional as F_
from torch import Tensor

from moesys.ops.clusters import ClusterOrder, SlotsByCode, member_means


def with_probes(by_code: SlotsByCode, is_first_N: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of which one slot of each expert's largest is a row by itself, the first in order of code of the first of equals.

    Args:
        is_first_N: where rows begin, in order of code.

    Returns:
        is_first_N, and pairs_E2: that slot and another of its row; -1 where no row has two. No host sync.
    """
    ids_N, num_slots = by_code.ids_N, by_code.ids_N.numel()
    if num_slots == 0:
        return is_first_N, ids_N.new_full((by_code.num_experts, 2), -1)
    places_N = torch.arange(num_slots, device=ids_N.device)
    # Slots without an expert come last: they are of no row, and of one expert more.
    is_first_N = is_first_N & (ids_N < by_code.num_experts)
    row_N = torch.where(ids_N < by_code.num_experts, is_first_N.cumsum(0) - 1, num_slots)
    sizes_R = ids_N.new_zeros(num_slots + 1).scatter_add_(0, row_N, torch.ones_like(ids_N))
    # The largest row, of equals that which begins first.
    rank_N = torch.where(is_first_N, sizes_R[row_N] * num_slots + num_slots - 1 - places_N, 0)
    best_E = ids_N.new_zeros(by_code.num_experts + 1).scatter_reduce(0, ids_N, rank_N, "amax")[:-1]
    has_two_E = best_E >= 2 * num_slots
    first_E = torch.where(has_two_E, num_slots - 1 - best_E % num_slots, 0)
    pairs_E2 = by_code.slots_N[torch.stack([first_E, first_E + has_two_E], dim=1)]
    begins_X = F_.pad(is_first_N, (0, 1))  # the last takes what is no pair
    begins_X[torch.where(has_two_E, first_E + 1, num_slots)] = True
    return begins_X[:-1], torch.where(has_two_E[:, None], pairs_E2, -1)


def rows_of_pairs(pairs_E2: Tensor, order: ClusterOrder) -> Tensor:
    """The rows of slots, [E, 2]; -1 = none."""
    return F_.pad(order.row_of_slot_TK.flatten(), (1, 0), value=-1)[pairs_E2 + 1]


def mean_square_residual(x_TD: Tensor, order: ClusterOrder) -> Tensor:
    """Of |x - c|^2, over the slots that share a row; one number, 0 where none does. x fp32 or fp64, `order` trimmed."""
    means_CD = member_means(x_TD, order)
    sizes_C = order.first_member_X.diff()
    slots_T = (order.row_of_slot_TK >= 0).sum(1)
    squares_T, squares_C = (x.square().sum(1) for x in (x_TD, means_CD))
    total = (slots_T * squares_T).sum() - (sizes_C * squares_C).sum()
    return total.clamp(min=0) / torch.where(sizes_C > 1, sizes_C, 0).sum().clamp(min=1)


@torch.no_grad()
def fitted_slopes(
    out_CD: Tensor, rows_CD: Tensor, pairs_E2: Tensor, least_square: Tensor, dtype: torch.dtype
) -> Tensor:
    """[E], of `dtype`, no gradient: 0 for an expert without a pair of rows, or whose two are too near.

    Args:
        out_CD: what the experts made of `rows_CD`.
        pairs_E2: rows; -1 = none.
        least_square: of |x - c| of a pair, one number.
    """
    if rows_CD.shape[0] == 0:
        return rows_CD.new_zeros(pairs_E2.shape[0], dtype=dtype)
    first_E, second_E = pairs_E2.clamp(min=0).unbind(1)
    moved_ED, apart_ED = (x[first_E].to(dtype) - x[second_E].to(dtype) for x in (out_CD, rows_CD))
    squares_E = apart_ED.square().sum(1)
    slopes_E = (moved_ED * apart_ED).sum(1) / squares_E
    return torch.where((squares_E > 0) & (squares_E >= least_square), slopes_E, 0.0)
