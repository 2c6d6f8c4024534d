"""Rows of numbers to rows of bytes, eight or four bits a number, and back.

Shapes: T tokens, K slots per token (slot t*K+k), N rows, D numbers each, W bytes each on the wire: D codes, of four bits two in
a byte, then the fp32 scale of each block of columns.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesys.ops import library, reference

LowPrecision = Literal["int8", "e4m3", "e5m2", "int4"]
_NUMBER: dict[str, int] = {"int8": 0, "e4m3": 1, "e5m2": 2, "int4": 3}
"""Of csrc/low_precision.h."""
CARRIED_ROWS = 64
"""So many rows in a row hand on what rounding took."""


@dataclass(frozen=True, kw_only=True)
class WireFormat:
    """How a row is written in few bits a number: each block of columns is scaled so that its largest becomes the format's.

    int8 has 127 steps on each side, all alike, and int4 has 7; e4m3 and e5m2 (2209.05433) have steps in proportion to the number, down to
    2^-9 and 2^-16.
    """

    kind: LowPrecision
    block: int = 0
    """Columns that share a scale, an even number with int4; 0 = the whole row."""
    is_stochastic: bool = False
    """Rounded up or down by chance, so that the mean of a code is the number. The chance hangs on the row's scale and place
    alone: the same rows are always rounded in the same way, and no state is kept."""
    hands_on: bool = False
    """What rounding takes from a row is given to the next (error feedback within a message, 64 rows at a time), to each number
    at most its own step, and what is more to those that follow: the sum over rows of like size is that of the numbers but
    for one row's rounding in 64."""
    is_checked: bool = True
    """A row that is not finite is an error that names it; otherwise its block is read as NaN."""

    def __post_init__(self) -> None:
        if self.block % reference.CODES_PER_BYTE[_NUMBER[self.kind]]:
            raise ValueError(f"block={self.block} must be even with int4, two in a byte")

    def row_bytes(self, d: int) -> int:
        """W of a row of `d` numbers."""
        return _row_bytes(d, _NUMBER[self.kind], self.block)


def _row_bytes(d: int, format: int, block: int) -> int:
    return -(-d // reference.CODES_PER_BYTE[format]) + 4 * -(-d // (block or d))


def pack(
    x_TD: Tensor, format: WireFormat, slot_of_row_N: Tensor | None = None, top_k: int = 1
) -> Tensor:
    """Write rows in few bits a number, gathered on the way: row n is x_TD[slot_of_row_N[n] // K].

    Args:
        x_TD: fp32, fp64, bf16 or fp16; not differentiable.
        slot_of_row_N: int64, -1 = a row of zeros. None = the rows of x, in their order.
        top_k: K.

    Returns:
        bytes_NW, uint8.

    Raises:
        ValueError: another shape or type.
        RuntimeError: the first row that is not finite, by its number (if the format checks), or an index out of range, on
            the CPU. On a GPU that is a device-side assertion.
    """
    if x_TD.dim() != 2 or x_TD.shape[1] == 0 or not x_TD.is_floating_point():
        raise ValueError(f"rows must be floating point [T, D], got {x_TD.dtype} {list(x_TD.shape)}")
    if slot_of_row_N is None:
        slot_of_row_N = torch.arange(x_TD.shape[0], device=x_TD.device)
    if slot_of_row_N.dim() != 1 or slot_of_row_N.dtype != torch.int64:
        raise ValueError(
            f"slot_of_row must be int64 [N], got {slot_of_row_N.dtype} {list(slot_of_row_N.shape)}"
        )
    carried_rows = CARRIED_ROWS if format.hands_on else 0
    rounding = (format.is_stochastic, carried_rows, format.is_checked)
    how = (top_k, _NUMBER[format.kind], format.block, *rounding)
    if library.runs_on(x_TD):
        return torch.ops.moesys.pack(x_TD.detach(), slot_of_row_N, *how)
    return reference.pack(x_TD.detach(), slot_of_row_N, *how)


def unpack(bytes_NW: Tensor, format: WireFormat, d: int, dtype: torch.dtype) -> Tensor:
    """Read what `pack` wrote: rows_ND of `dtype`, D = d.

    Raises:
        ValueError: bytes of another type or width.
    """
    width = format.row_bytes(d)
    if bytes_NW.dim() != 2 or bytes_NW.shape[1] != width or bytes_NW.dtype != torch.uint8:
        raise ValueError(
            f"rows of {d} numbers must be uint8 [N, {width}], got {bytes_NW.dtype} {list(bytes_NW.shape)}"
        )
    like = bytes_NW.new_empty(0, dtype=dtype)
    how = (d, _NUMBER[format.kind], format.block)
    if library.runs_on(bytes_NW):
        return torch.ops.moesys.unpack(bytes_NW, like, *how)
    return reference.unpack(bytes_NW, like, *how)


if library.is_loaded():

    @torch.library.register_fake("moesys::pack")
    def _(
        x_TD: Tensor, slot_of_row_N: Tensor, top_k: int, format: int, block: int, *rounding: int
    ) -> Tensor:
        width = _row_bytes(x_TD.shape[1], format, block)
        return x_TD.new_empty(slot_of_row_N.shape[0], width, dtype=torch.uint8)

    @torch.library.register_fake("moesys::unpack")
    def _(bytes_NW: Tensor, like: Tensor, d: int, format: int, block: int) -> Tensor:
        return like.new_empty(bytes_NW.shape[0], d)
