"""Ulysses attention (2309.14509): each rank trades its share of the positions for whole sequences of some heads.

Every rank holds the positions that `context.local_positions` gives it. One all-to-all brings the whole sequences of
N / P query heads, put in order, with the key/value heads that these read; another brings the outputs back.

Shapes: B samples, N query heads, M key/value heads, S positions of this rank, H head dim, P ranks, W = P * S
positions of a whole sequence, C = S / 2 positions of a chunk, A heads of one rank, of any kind.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moesys.parallel.context import DocumentEnds, check_documents, check_equal_chunks
from moesys.parallel.exchange import swap


class UlyssesAttention:
    """An attention core for sequences that are shared out over the ranks of `group`.

    Each rank sends, in bytes as profile.traffic counts them, with M' = max(M, P) for key/value heads that several ranks read:

        forward    (P - 1) / P * (2 * N + 2 * M') * B * S * H * bytes per element
        backward   the same
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def __call__(
        self, q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, ends: DocumentEnds | None = None
    ) -> Tensor:
        """Return [B, N, S, H]; with `ends`, of the whole sequences, a token sees its own document only.

        Raises ValueError for an odd S, for heads that do not share out over the ranks, and for documents that do
        not fill the whole sequences.
        """
        seq_len = q_BNSH.shape[2] * self.size
        check_equal_chunks(seq_len, self.size)
        check_heads(q_BNSH.shape[1], k_BMSH.shape[1], self.size)
        if ends is not None:
            check_documents(ends, q_BNSH.shape[0], seq_len)
        copies = max(1, self.size // k_BMSH.shape[1])
        k_BMSH, v_BMSH = (x.repeat_interleave(copies, dim=1) for x in (k_BMSH, v_BMSH))
        sent_PBASH = torch.cat(
            [x.unflatten(1, (self.size, -1)).movedim(1, 0) for x in (q_BNSH, k_BMSH, v_BMSH)], dim=2
        )
        qkv_BAWH = in_order(swap(sent_PBASH, self.group))
        heads = [x.shape[1] // self.size for x in (q_BNSH, k_BMSH, v_BMSH)]
        q_BAWH, k_BAWH, v_BAWH = qkv_BAWH.split(heads, dim=1)
        out_BAWH = _attention(q_BAWH, k_BAWH, v_BAWH, ends)
        received_PBASH = swap(in_shares(out_BAWH, self.size), self.group)
        return received_PBASH.movedim(0, 1).flatten(1, 2)


def check_heads(num_heads: int, num_kv_heads: int, size: int) -> None:
    """Raise ValueError unless the query heads share out evenly, and each rank's read whole key/value heads."""
    if num_heads % size:
        raise ValueError(
            f"num_heads={num_heads} must be a multiple of the {size} ranks of Ulysses attention; "
            "ring attention has no such rule"
        )
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} must be a multiple or a divisor of the {size} ranks of Ulysses attention; "
            "ring attention has no such rule"
        )


def in_order(x_PBASH: Tensor) -> Tensor:
    """The shares of all ranks, by rank, to whole sequences [B, A, W, H]."""
    early_BAPCH, late_BAPCH = x_PBASH.movedim(0, 2).unflatten(3, (2, -1)).unbind(3)
    return torch.cat([early_BAPCH, late_BAPCH.flip(2)], dim=2).flatten(2, 3)


def in_shares(x_BAWH: Tensor, size: int) -> Tensor:
    """Whole sequences to the shares of all ranks [P, B, A, S, H]."""
    early_BAPCH, late_BAPCH = x_BAWH.unflatten(2, (2 * size, -1)).chunk(2, dim=2)
    return torch.stack([early_BAPCH, late_BAPCH.flip(2)], dim=3).flatten(3, 4).movedim(2, 0)


def _attention(q_BAWH: Tensor, k_BAWH: Tensor, v_BAWH: Tensor, ends: DocumentEnds | None) -> Tensor:
    if ends is None:
        return _causal(q_BAWH, k_BAWH, v_BAWH)
    return torch.cat(
        [
            torch.cat(
                [
                    _causal(
                        *(x[sample : sample + 1, :, begin:end] for x in (q_BAWH, k_BAWH, v_BAWH))
                    )
                    for begin, end in pairwise((0, *sample_ends))
                    if begin < end
                ],
                dim=2,
            )
            for sample, sample_ends in enumerate(ends)
        ]
    )


def _causal(q_BAWH: Tensor, k_BAWH: Tensor, v_BAWH: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q_BAWH, k_BAWH, v_BAWH, is_causal=True, enable_gqa=q_BAWH.shape[1] != k_BAWH.shape[1]
    )
