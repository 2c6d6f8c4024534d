"""Slots in order of code cut into rows, each by as few digits as keep its tokens near each other.

Shapes: T tokens, K slots per token, N = T * K slots, X numbers of a token's sketch, C rows.
"""

import torch
from torch import Tensor

from moesys.ops import library
from moesys.ops.clusters import SlotsByCode, member_means


def split_rows(
    sketch_TX: Tensor, by_code: SlotsByCode, base: int, digits: int, most: Tensor
) -> Tensor:
    """Cut every expert's slots by the fewest digits of their codes, at least one, with which

        mean over a row's members of |sketch - their mean|^2 <= most;

    a slot whose row is too wide with all digits is a row by itself.

    Args:
        sketch_TX: fp32.
        by_code: of codes with `digits` digits to that base, at least 0.
        most: fp32, one number.

    Returns:
        is_first_N, bool: where a row begins, in order of code. On the CPU one pass over the slots, elsewhere one for each
        digit; no host sync on a GPU.

    Raises:
        ValueError: a sketch of another shape or type.
    """
    num_slots = by_code.slots_N.shape[0]
    top_k = num_slots // max(1, sketch_TX.shape[0])
    if sketch_TX.dim() != 2 or sketch_TX.dtype != torch.float32:
        raise ValueError(f"sketches must be fp32 [T, X], got {sketch_TX.dtype} {sketch_TX.shape}")
    if sketch_TX.shape[0] * top_k != num_slots:
        raise ValueError(f"{sketch_TX.shape[0]} sketches are not those of {num_slots} slots")
    if sketch_TX.device.type == "cpu" and library.runs_on(sketch_TX) and num_slots:
        slots = (by_code.slots_N, by_code.ids_N, by_code.codes_N)
        how = (top_k, by_code.num_experts, base, digits, most.item())
        return torch.ops.moesys.split_rows(sketch_TX, *slots, *how)
    return split_by_digit(sketch_TX, by_code, base, digits, most)


def split_by_digit(
    sketch_TX: Tensor, by_code: SlotsByCode, base: int, digits: int, most: Tensor
) -> Tensor:
    """The same, digit by digit."""
    energy_T1 = sketch_TX.square().sum(1, keepdim=True)
    both_TX = torch.cat([sketch_TX, energy_T1], dim=1)
    is_open_N = by_code.ids_N < by_code.num_experts
    is_first_N = torch.zeros_like(is_open_N)
    for left in reversed(range(digits)):
        # Slots of one prefix are closed together.
        begins_N = by_code.is_new(by_code.codes_N // base**left)
        order = by_code.in_order_of_code(begins_N)
        means_CX = member_means(both_TX, order)
        spread_C = means_CX[:, -1] - means_CX[:, :-1].square().sum(1)
        row_N = order.row_of_slot_TK.flatten()[by_code.slots_N]
        closes_N = is_open_N & (spread_C <= most)[row_N]
        is_first_N |= closes_N & begins_N
        is_open_N &= ~closes_N
    return is_first_N | is_open_N


if library.is_loaded():

    @torch.library.register_fake("moesys::split_rows")
    def _(sketch_TX: Tensor, slots_N: Tensor, *rest: object) -> Tensor:
        return slots_N.new_empty(slots_N.shape, dtype=torch.bool)
