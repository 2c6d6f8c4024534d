"""What a codec is: it lets fewer rows travel than there are slots.

Shapes: T tokens on this rank, D model, K experts per token, C rows that travel (at most the slots that have an expert).
"""

from typing import Protocol

from torch import Tensor


class Code(Protocol):
    """What one forward's rows are made of, and what becomes of the results: integers, made once and recalled by a recomputation."""

    @property
    def ids_C1(self) -> Tensor:
        """int64, the expert of each row."""
        ...

    def encode(self, x_TD: Tensor) -> Tensor:
        """The rows that travel, rows_CD; differentiable."""
        ...

    def decode(self, out_CD: Tensor, rows_CD: Tensor, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """y_TD of what the experts made of `rows_CD` = encode(x_TD); differentiable in all four."""
        ...


class Codec(Protocol):
    """Chooses the code of a layer's tokens, in training: an evaluation is that of the model.

    A torch module without weights, built with `d_model`, with `layer` if it names it, and its options; a class of your own is
    chosen by `_target_`, as a router is. What it refuses it refuses in its constructor, by ValueError.
    """

    def plan(self, x_TD: Tensor, topk_ids_TK: Tensor, num_experts: int) -> Code:
        """Of the layer's input and its experts (-1 = none). No gradient flows."""
        ...
