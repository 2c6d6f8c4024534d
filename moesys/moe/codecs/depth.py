"""How many digits of a code count: few make few rows, more make rows nearer to their tokens.

Shapes: T tokens, N slots in order of code, C rows, X numbers of a token's sketch, H digits of a code.
"""

from torch import Tensor

from moesys.ops.clusters import SlotsByCode, rows_by_prefix
from moesys.ops.splits import split_rows


def within_share(by_code: SlotsByCode, base: int, digits: int, share: float) -> Tensor:
    """Where rows begin, is_first_N, of codes cut to as many first digits, at least one, as make at most `share` of the slots'
    number of rows. One host sync."""
    counts_H = rows_by_prefix(by_code, base, digits)
    allowed = share * (by_code.ids_N < by_code.num_experts).sum()
    used = max(1, int((counts_H <= allowed).sum()))  # counts rise with every digit
    return by_code.is_new(by_code.codes_N // base ** (digits - used))


def within_error(
    by_code: SlotsByCode, base: int, digits: int, sketch_TX: Tensor, bound: float
) -> Tensor:
    """Where rows begin, is_first_N, of codes each cut to the fewest digits with which its row keeps to

        mean over members of |x - their mean|^2  <=  bound^2 * mean over all tokens of |x|^2

    as the sketches of the tokens have it; a slot whose row does not with all digits is a row by itself.
    """
    sketch_TX = sketch_TX.float()
    most = bound**2 * sketch_TX.square().sum(1).mean()
    return split_rows(sketch_TX, by_code, base, digits, most)
