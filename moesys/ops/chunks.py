"""Chunks of numbers laid end to end, and added to, all at once: on a GPU a launch for 128 of them in the place of one for each.

Shapes: N numbers of all chunks together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesys.ops import library, reference


@torch.no_grad()
def pack_chunks(chunks: Sequence[Tensor], like: Tensor) -> Tensor:
    """Lay chunks end to end: flat_N of the type and on the device of `like`. Not differentiable.

    Args:
        chunks: of any shapes and lengths, also none; fp32, fp64, bf16 or fp16, each of its own type, rounded as torch does.

    Raises:
        RuntimeError: another type or device.
    """
    if library.runs_on(like):
        return torch.ops.moesys.pack_chunks(chunks, like)
    return reference.pack_chunks(chunks, like)


@torch.no_grad()
def add_chunks(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add each part to its total, in place, with the bits of `total.add_(part)` one after the other. Not differentiable.

    Args:
        pairs: (part, total), also none, of as many numbers but any shapes; fp32, fp64, bf16 or fp16, all parts of one type,
            all totals of one. A total may stand several times, always whole; otherwise no two tensors share memory.

    Raises:
        RuntimeError: other types, lengths or devices.
    """
    if not pairs:
        return
    parts, totals = zip(*pairs, strict=True)
    if library.runs_on(totals[0]) and all(map(Tensor.is_contiguous, parts + totals)):
        torch.ops.moesys.add_chunks(parts, totals)
        torch.autograd.graph.increment_version(totals)  # what autograd saved of them is gone
    else:
        reference.add_chunks(pairs)


if library.is_loaded():

    @torch.library.register_fake("moesys::pack_chunks")
    def _(chunks: Sequence[Tensor], like: Tensor) -> Tensor:
        return like.new_empty(sum(chunk.numel() for chunk in chunks))

    @torch.library.register_fake("moesys::add_chunks")
    def _(parts: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
        return None
