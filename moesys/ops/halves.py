"""Slots of each expert cut in two, and again, until those that stay together are near each other.

Shapes: T tokens, K slots per token, N = T * K slots, E experts, X numbers of a token's sketch.
"""

from functools import partial

import torch
from torch import Tensor

from moesys.ops import library
from moesys.ops.clusters import ClusterOrder, cluster_order, member_means

MOST_CUTS = 32
"""One within the other; what is still too wide then is cut into single slots."""
_STEPS = 2
"""Of the power iteration that finds where slots differ most."""


def halve(sketch_TX: Tensor, topk_ids_TK: Tensor, num_experts: int, most: Tensor) -> Tensor:
    """Cut until the mean over a part's members of |sketch - their mean|^2 is at most `most`.

    A cut is across u, two steps of power iteration on the part's covariance from the member that is furthest from the mean, at the
    mean: members with (sketch - mean) u > 0 go to one side.

    Args:
        sketch_TX: fp32.
        topk_ids_TK: int64, 0..num_experts-1, or -1 = no expert.
        most: fp32, one number.

    Returns:
        codes_TK, int64: the first slot of each slot's part, its own where it has no expert.

    Raises:
        ValueError: a sketch of another shape or type.
        RuntimeError: the first token whose sketch is not finite, by its number, on the CPU. On a GPU that is a device-side
            assertion.
    """
    if sketch_TX.dim() != 2 or sketch_TX.dtype != torch.float32:
        raise ValueError(f"sketches must be fp32 [T, X], got {sketch_TX.dtype} {sketch_TX.shape}")
    if topk_ids_TK.dim() != 2 or topk_ids_TK.shape[0] != sketch_TX.shape[0]:
        raise ValueError(f"experts {topk_ids_TK.shape} are not of {sketch_TX.shape[0]} tokens")
    if topk_ids_TK.numel() == 0:
        return topk_ids_TK
    if sketch_TX.device.type == "cpu":
        if library.runs_on(sketch_TX):
            how = (num_experts, MOST_CUTS, _STEPS, most.item())
            return torch.ops.moesys.halve(sketch_TX, topk_ids_TK, *how)
        bad_T = ~sketch_TX.isfinite().all(1)
        if bad_T.any():
            raise RuntimeError(f"halve: row {int(bad_T.nonzero()[0])} is not finite")
    else:
        torch._assert_async(sketch_TX.isfinite().all())
    return halve_all_at_once(sketch_TX, topk_ids_TK, num_experts, most)


def halve_all_at_once(
    sketch_TX: Tensor, topk_ids_TK: Tensor, num_experts: int, most: Tensor
) -> Tensor:
    """The same, one cut of all parts after the other; a host sync for each."""
    num_slots, top_k = topk_ids_TK.numel(), topk_ids_TK.shape[1]
    x_NX = sketch_TX.repeat_interleave(top_k, 0)
    ids_N1 = topk_ids_TK.reshape(-1, 1)
    slots_N = torch.arange(num_slots, device=ids_N1.device)
    found_N, path_N = slots_N.clone(), torch.zeros_like(slots_N)
    is_open_N = ids_N1[:, 0] >= 0
    for cut in range(MOST_CUTS + 1):
        order = cluster_order(ids_N1, path_N[:, None], num_experts)
        row_N = order.row_of_slot_TK[:, 0].clamp(min=0)
        mean = partial(_mean_of_row, order, row_N)
        apart_NX = x_NX - mean(x_NX)
        square_N1 = apart_NX.square().sum(1, keepdim=True)
        first_N = order.member_slots_M[order.first_member_X[row_N].clamp(max=num_slots - 1)]
        closes_N = is_open_N & ((mean(square_N1)[:, 0] <= most) | _is_alone(order, row_N))
        found_N = torch.where(closes_N, first_N, found_N)
        is_open_N = is_open_N & ~closes_N
        if cut == MOST_CUTS or not is_open_N.any():
            break
        u_NX = apart_NX[_furthest(square_N1[:, 0], row_N, is_open_N)]
        for _ in range(_STEPS):
            u_NX = mean(apart_NX * (apart_NX * u_NX).sum(1, keepdim=True))
            u_NX = u_NX / u_NX.norm(dim=1, keepdim=True)
        is_right_N = (apart_NX * u_NX).sum(1) > 0
        share_N = mean(is_right_N.float()[:, None])[:, 0]
        is_cut_N = (share_N > 0) & (share_N < 1)
        is_right_N = torch.where(is_cut_N, is_right_N, slots_N != first_N)
        path_N = 2 * path_N + is_right_N
    return found_N.view_as(topk_ids_TK)


def _mean_of_row(order: ClusterOrder, row_N: Tensor, values_NX: Tensor) -> Tensor:
    """Each slot's, over the members of its row."""
    return member_means(values_NX, order)[row_N]


def _is_alone(order: ClusterOrder, row_N: Tensor) -> Tensor:
    return order.first_member_X.diff()[row_N] == 1


def _furthest(square_N: Tensor, row_N: Tensor, is_open_N: Tensor) -> Tensor:
    """The member of each slot's row with the largest square, the first of equals."""
    num_slots = len(row_N)
    row_N = torch.where(is_open_N, row_N, num_slots)
    largest_R = square_N.new_zeros(num_slots + 1).scatter_reduce(0, row_N, square_N, "amax")
    slots_N = torch.arange(num_slots, device=row_N.device)
    slots_N = torch.where(square_N == largest_R[row_N], slots_N, num_slots - 1)
    first_R = row_N.new_full((num_slots + 1,), num_slots - 1)
    return first_R.scatter_reduce(0, row_N, slots_N, "amin")[row_N]


if library.is_loaded():

    @torch.library.register_fake("moesys::halve")
    def _(sketch_TX: Tensor, topk_ids_TK: Tensor, *rest: object) -> Tensor:
        return topk_ids_TK.new_empty(topk_ids_TK.shape)
