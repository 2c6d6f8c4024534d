"""Rows that stand for many tokens: hash, mean of the members, and back to tokens.

Shapes: T tokens, K slots per token (slot t*K+k), D model, H hashes of V dimensions each, E experts, C rows (clusters of slots),
M members: the slots that have a row, in order of row; row c's are member_slots_M[first_member_X[c]:first_member_X[c + 1]],
X = C + 1.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F_
from torch import Tensor

from moesys.ops import library, reference
from moesys.ops.permute import unpermute


class ClusterOrder(NamedTuple):
    """Which slots share a row. Before its sizes are known on the host the last three have spare entries."""

    row_of_slot_TK: Tensor
    """int64, -1 = no expert, no row."""
    rows_per_expert_E: Tensor
    """int64; expert e's rows follow those of e-1."""
    member_slots_M: Tensor
    """int64; spare entries are slots without a row."""
    first_member_X: Tensor
    """int64; spare entries are the number of members."""

    @property
    def num_members(self) -> Tensor:
        """int64, one number on the device."""
        return self.first_member_X[-1]

    def trimmed(self, num_rows: int, num_members: int) -> "ClusterOrder":
        """Without what is spare."""
        return self._replace(
            member_slots_M=self.member_slots_M[:num_members],
            first_member_X=self.first_member_X[: num_rows + 1],
        )


def cluster_order(topk_ids_TK: Tensor, codes_TK: Tensor, num_experts: int) -> ClusterOrder:
    """Give one row to all slots of an expert that have the same code.

    Args:
        topk_ids_TK: int64 or int32, 0..num_experts-1, or -1 = no expert.
        codes_TK: int64, any number.

    Returns:
        Rows in order of expert, then of their first slot (as expert_order's, where no two slots share a row); members of a
        row in order of slot: bit-equal from run to run. No device-to-host sync, so all have full length: `trimmed` by the
        caller who knows the sizes.
    """
    by_code = slots_by_code(topk_ids_TK, codes_TK, num_experts)
    return by_code.in_order_of_slot(by_code.is_new(by_code.codes_N))


class SlotsByCode(NamedTuple):
    """Slots in order of expert, then code, then slot: in order of every prefix of their codes too."""

    topk_ids_TK: Tensor
    num_experts: int
    ids_by_slot_N: Tensor
    """The expert of each slot, `num_experts` where it has none."""
    slots_N: Tensor
    ids_N: Tensor
    codes_N: Tensor

    def is_new(self, prefixes_N: Tensor) -> Tensor:
        """Where the expert or the prefix (of `codes_N`) is another than just before."""
        is_new_N = torch.ones_like(self.ids_N, dtype=torch.bool)
        is_new_N[1:] = (self.ids_N[1:] != self.ids_N[:-1]) | (prefixes_N[1:] != prefixes_N[:-1])
        return is_new_N

    def in_order_of_slot(self, is_first_N: Tensor) -> ClusterOrder:
        """Of rows that begin where `is_first_N` says: as `cluster_order` orders them."""
        num_slots, slots_N = self.slots_N.numel(), self.slots_N
        # Slots without an expert come last, after all rows.
        row_N = torch.where(self.ids_N < self.num_experts, is_first_N.cumsum(0) - 1, num_slots)
        least_C = slots_N.new_full((num_slots + 1,), num_slots)
        least_C.scatter_reduce_(0, row_N, slots_N, "amin")
        first_slot_N = torch.empty_like(slots_N).scatter_(0, slots_N, least_C[row_N])
        slots_N = (self.ids_by_slot_N * num_slots + first_slot_N).argsort(stable=True)
        is_first_N = first_slot_N[slots_N] == slots_N
        return self._order(slots_N, self.ids_by_slot_N[slots_N], is_first_N)

    def in_order_of_code(self, is_first_N: Tensor) -> ClusterOrder:
        """The same rows, they and their members in order of code. Sorts nothing."""
        return self._order(self.slots_N, self.ids_N, is_first_N)

    def _order(self, slots_N: Tensor, ids_N: Tensor, is_first_N: Tensor) -> ClusterOrder:
        """Of slots in order, the expert of each, and where a row begins."""
        num_slots = slots_N.numel()
        has_row_N = ids_N < self.num_experts
        is_first_N = has_row_N & is_first_N
        row_N = torch.where(has_row_N, is_first_N.cumsum(0) - 1, -1)
        # One spare entry takes what is no first member.
        first_member = has_row_N.sum().expand(num_slots + 2).clone()
        places_N = torch.arange(num_slots, device=slots_N.device)
        first_member.scatter_(0, torch.where(is_first_N, row_N, num_slots + 1), places_N)
        rows_per_expert = ids_N.new_zeros(self.num_experts + 1)
        rows_per_expert.scatter_add_(0, ids_N, is_first_N.long())
        row_of_slot_N = row_N.new_empty(num_slots).scatter_(0, slots_N, row_N)
        return ClusterOrder(
            row_of_slot_TK=row_of_slot_N.view_as(self.topk_ids_TK),
            rows_per_expert_E=rows_per_expert[:-1],
            member_slots_M=slots_N,
            first_member_X=first_member[:-1],
        )


def slots_by_code(topk_ids_TK: Tensor, codes_TK: Tensor, num_experts: int) -> SlotsByCode:
    """Arguments as of cluster_order."""
    ids_N, codes_N = topk_ids_TK.flatten().long(), codes_TK.flatten()
    ids_N = torch.where(ids_N < 0, num_experts, ids_N)
    by_code_N = codes_N.argsort(stable=True)
    slots_N = by_code_N[ids_N[by_code_N].argsort(stable=True)]
    return SlotsByCode(topk_ids_TK, num_experts, ids_N, slots_N, ids_N[slots_N], codes_N[slots_N])


def rows_by_prefix(by_code: SlotsByCode, base: int, digits: int) -> Tensor:
    """How many rows there are of codes cut to their first 1, 2, ..., `digits` digits: int64 [digits].

    Args:
        by_code: of codes with `digits` digits to that base, at least 0.
    """
    has_row_N = by_code.ids_N < by_code.num_experts
    counts = [
        (has_row_N & by_code.is_new(by_code.codes_N // base**digit)).sum()
        for digit in reversed(range(digits))
    ]
    return torch.stack(counts)


def cross_polytope(turned_THV: Tensor) -> Tensor:
    """The vertex of the cross-polytope that each turned row is nearest to (2411.08446, Eq. 3).

    Args:
        turned_THV: each row turned by each hash: fp32, fp64, bf16 or fp16.

    Returns:
        codes_TH, int64: 2 v + (1 if turned[v] < 0), v the place of the entry furthest from 0, the first of equals.

    Raises:
        ValueError: not three-dimensional, or V = 0.
        RuntimeError: a row that is not finite, by its number, on the CPU. On a GPU that is a device-side assertion.
    """
    if turned_THV.dim() != 3 or turned_THV.shape[2] == 0 or not turned_THV.is_floating_point():
        raise ValueError(
            f"the turned rows must be floating point [T, H, V], got {turned_THV.dtype} {list(turned_THV.shape)}"
        )
    if library.runs_on(turned_THV):
        return torch.ops.moesys.cross_polytope(turned_THV)
    return reference.cross_polytope(turned_THV)


def member_means(x_TD: Tensor, order: ClusterOrder) -> Tensor:
    """The mean of each row's tokens: means_CD[c] = sum over its members of x_TD[slot // K] / their number.

    Args:
        x_TD: fp32, fp64, bf16 or fp16; sums are kept in fp32 (fp64).
        order: trimmed, or with rows of zeros for what is spare. The mean of one member is that token, bit for bit.

    The gradient of a token is the sum over its slots of the row's gradient over the row's members.

    Raises:
        ValueError: another shape or type.
        RuntimeError: an index out of range, on the CPU. On a GPU that is a device-side assertion.
    """
    _check(x_TD, order)
    arguments = (order.row_of_slot_TK, order.member_slots_M, order.first_member_X)
    if library.runs_on(x_TD):
        return torch.ops.moesys.member_means(x_TD, *arguments)
    return reference.member_means(x_TD, *arguments)


def restore(
    rows_CD: Tensor,
    means_CD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    slopes_C: Tensor,
    order: ClusterOrder,
) -> Tensor:
    """Sum each token's rows, each moved by how far the token is from the row's mean:

        y_TD[t] = sum_k weights[t, k] * (rows[c] + slopes[c] * (x[t] - means[c])), c = order.row_of_slot_TK[t, k]

    (2411.08446, 3.2: residual compensation, with a slope of 1). A token that is its row's only member gets exactly its rows.

    Args:
        rows_CD: what the experts made of the means.
        means_CD, x_TD: of the same type.
        weights_TK: fp32 (fp64 with fp64 rows).
        slopes_C: of the weights' type; gets no gradient. 0 = the row as it is.
        order: trimmed.

    Returns:
        y_TD of x's type, summed in weights' type in the order of k. Gradients reach rows, means, x and weights; those of
        rows are summed over members.

    Raises:
        ValueError, RuntimeError: as member_means.
    """
    _check(x_TD, order)
    weights_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    num_rows = order.first_member_X.shape[0] - 1
    for name, tensor, shape, dtype in (
        ("rows", rows_CD, [num_rows, x_TD.shape[1]], x_TD.dtype),
        ("means", means_CD, [num_rows, x_TD.shape[1]], x_TD.dtype),
        ("weights", weights_TK, list(order.row_of_slot_TK.shape), weights_dtype),
        ("slopes", slopes_C, [num_rows], weights_dtype),
    ):
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} {shape}, got {tensor.dtype} {list(tensor.shape)}"
            )
    arguments = (order.row_of_slot_TK, order.member_slots_M, order.first_member_X)
    if library.runs_on(x_TD):
        return torch.ops.moesys.restore(rows_CD, means_CD, x_TD, weights_TK, slopes_C, *arguments)
    return reference.restore(rows_CD, means_CD, x_TD, weights_TK, slopes_C, order.row_of_slot_TK)


def _check(x_TD: Tensor, order: ClusterOrder) -> None:
    num_tokens = order.row_of_slot_TK.shape[0]
    if x_TD.dim() != 2 or x_TD.shape[0] != num_tokens or not x_TD.is_floating_point():
        raise ValueError(
            f"x must be floating point [T, D] with T = {num_tokens} as in the order, got {x_TD.dtype} "
            f"{list(x_TD.shape)}"
        )


if library.is_loaded():

    @torch.library.register_fake("moesys::cross_polytope")
    def _(turned_THV: Tensor) -> Tensor:
        return turned_THV.new_empty(turned_THV.shape[:2], dtype=torch.int64)

    @torch.library.register_fake("moesys::member_means")
    def _(
        x_TD: Tensor, row_of_slot_TK: Tensor, member_slots_M: Tensor, first_member_X: Tensor
    ) -> Tensor:
        return x_TD.new_empty(first_member_X.shape[0] - 1, x_TD.shape[1])

    @torch.library.register_fake("moesys::restore")
    def _(
        rows_CD: Tensor, means_CD: Tensor, x_TD: Tensor, weights_TK: Tensor, *rest: Tensor
    ) -> Tensor:
        return x_TD.new_empty(x_TD.shape)

    @torch.library.register_fake("moesys::restore_backward")
    def _(
        grad_TD: Tensor,
        rows_CD: Tensor,
        means_CD: Tensor,
        x_TD: Tensor,
        weights_TK: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            rows_CD.new_empty(rows_CD.shape),
            x_TD.new_empty(x_TD.shape),
            weights_TK.new_empty(weights_TK.shape),
        )

    def _means_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, row_of_slot_TK, _, first_member_X = inputs
        ctx.save_for_backward(row_of_slot_TK, first_member_X)

    def _means_backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor | None, ...]:
        row_of_slot_TK, first_member_X = ctx.saved_tensors
        sizes_C = first_member_X.diff().to(torch.promote_types(grad_CD.dtype, torch.float32))
        shares_C = F_.pad(sizes_C.reciprocal(), (0, 1))  # the last is read where there is no row
        return unpermute(grad_CD, shares_C[row_of_slot_TK], row_of_slot_TK), None, None, None

    def _restore_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def _restore_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives each back once
        slopes_C = saved[4]
        rows_CD, x_TD, weights_TK = torch.ops.moesys.restore_backward(grad_TD, *saved)
        means_CD = None
        if ctx.needs_input_grad[1]:
            means_CD = rows_CD * -slopes_C[:, None].to(rows_CD.dtype)
        return rows_CD, means_CD, x_TD, weights_TK, None, None, None, None

    torch.library.register_autograd(
        "moesys::member_means", _means_backward, setup_context=_means_setup
    )
    torch.library.register_autograd(
        "moesys::restore", _restore_backward, setup_context=_restore_setup
    )
