"""Where each slot goes when slots are grouped by expert.

Shapes: T tokens, K slots per token (slot t*K+k), E experts, N = T*K slots.
"""

import torch
from torch import Tensor

from moesys.ops import library, reference


def tokens_per_expert(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Count the slots of each expert: int64 [E].

    Args:
        topk_ids_TK: int64 or int32, 0..num_experts-1, or -1 = no expert (not counted).
        num_experts: E.

    Raises:
        ValueError: not two-dimensional, another type, or num_experts < 1.
        RuntimeError: another id, on the CPU. On a GPU that is a device-side assertion.

    No device-to-host sync.
    """
    _check_ids(topk_ids_TK, num_experts)
    if library.runs_on(topk_ids_TK):
        return torch.ops.moesys.tokens_per_expert(topk_ids_TK, num_experts)
    return reference.tokens_per_expert(topk_ids_TK, num_experts)


def expert_order(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort slots by expert, keeping the order of slots within an expert (a stable counting sort).

    Args:
        topk_ids_TK: int64 or int32, 0..num_experts-1, or -1 = no expert: such a slot gets no row.
        num_experts: E.

    Returns:
        row_of_slot_TK: int64, the row each slot got; -1 where the id is -1.
        slot_of_row_N: int64 of full length T*K, its inverse; the rows that exist come first, the
            rest is -1. `slot_of_row_N[:num_rows]` with `num_rows = int(counts_E.sum())` keeps what
            exists, at the price of one device-to-host sync (no sync is needed where no id is -1).
        counts_E: int64, the rows of each expert; expert e's rows follow those of e-1.

    Raises:
        ValueError, RuntimeError: as tokens_per_expert.

    No device-to-host sync, and no order that depends on timing: bit-equal from run to run.
    """
    _check_ids(topk_ids_TK, num_experts)
    if library.runs_on(topk_ids_TK):
        return torch.ops.moesys.expert_order(topk_ids_TK, num_experts)
    return reference.expert_order(topk_ids_TK, num_experts)


def _check_ids(topk_ids_TK: Tensor, num_experts: int) -> None:
    if topk_ids_TK.dim() != 2 or topk_ids_TK.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "topk_ids must be int64 or int32 [T, K], got "
            f"{topk_ids_TK.dtype} {list(topk_ids_TK.shape)}"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")


if library.is_loaded():

    @torch.library.register_fake("moesys::tokens_per_expert")
    def _(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
        return topk_ids_TK.new_empty(num_experts, dtype=torch.int64)

    @torch.library.register_fake("moesys::expert_order")
    def _(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            topk_ids_TK.new_empty(topk_ids_TK.shape, dtype=torch.int64),
            topk_ids_TK.new_empty(topk_ids_TK.numel(), dtype=torch.int64),
            topk_ids_TK.new_empty(num_experts, dtype=torch.int64),
        )
