"""How many digits of a code count: few make few rows, more make rows nearer to their tokens.

Shapes: T tokens, K experts per token, E experts, N = T * K slots, C rows, X numbers of a token's sketch, H digits of a code.
"""

import torch
from torch import Tensor

from moesys.ops.clusters import member_means, rows_by_prefix, slots_by_code


def within_share(
    codes_TK: Tensor, topk_ids_TK: Tensor, num_experts: int, base: int, digits: int, share: float
) -> Tensor:
    """Codes cut to as many first digits, at least one, as make at most `share` of the slots' number of rows. One host sync."""
    counts_H = rows_by_prefix(topk_ids_TK, codes_TK, num_experts, base, digits)
    allowed = share * (topk_ids_TK >= 0).sum()
    used = max(1, int((counts_H <= allowed).sum()))  # counts rise with every digit
    return codes_TK // base ** (digits - used)


def within_error(
    codes_TK: Tensor,
    topk_ids_TK: Tensor,
    num_experts: int,
    base: int,
    digits: int,
    sketch_TX: Tensor,
    bound: float,
) -> Tensor:
    """Codes each cut to the fewest digits with which its row keeps to

        mean over members of |x - their mean|^2  <=  bound^2 * mean over all tokens of |x|^2

    as the sketches of the tokens have it; a slot whose row does not with all digits is a row by itself. No host sync.
    """
    sketch_TX = sketch_TX.float()
    energy_T1 = sketch_TX.square().sum(1, keepdim=True)
    both_TX = torch.cat([sketch_TX, energy_T1], dim=1)
    most = bound**2 * energy_T1.mean()
    found_TK = -1 - torch.arange(codes_TK.numel(), device=codes_TK.device).view_as(codes_TK)
    is_open_TK = torch.ones_like(codes_TK, dtype=torch.bool)
    by_code = slots_by_code(topk_ids_TK, codes_TK, num_experts)
    for left in reversed(range(digits)):
        # Rows of one prefix are closed together: what is cut here is no other row's code.
        order = by_code.order(by_code.codes_N // base**left)
        means_CX = member_means(both_TX, order)
        spread_C = means_CX[:, -1] - means_CX[:, :-1].square().sum(1)
        closes_TK = is_open_TK & (spread_C <= most)[order.row_of_slot_TK]
        found_TK = torch.where(closes_TK, codes_TK // base**left * base**left, found_TK)
        is_open_TK &= ~closes_TK
    return found_TK
