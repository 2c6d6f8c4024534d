"""torch.compile over what each block does to queries and keys between its products: cut into heads, norm, turn.

The rest of a block is products, exchanges, attention cores and our own operators, at each of which a compiler breaks its
graph. One compiled graph serves all blocks, under every axis and with documents of any lengths.
"""

import torch

from moesys.models.transformer import Transformer


def compile_blocks(part: Transformer) -> None:
    """Before recomputation wraps the blocks. The first step compiles, in seconds."""
    for block in part.blocks():
        block.attn.heads = torch.compile(block.attn.heads)
