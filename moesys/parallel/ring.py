"""Ring attention (2310.01889): each rank keeps its queries, and the keys and values go around.

Every rank holds the positions that `context.local_positions` gives it. In each of `size` steps it computes its
queries' tiles with the keys it has at hand, while it already passes these on to the next rank and receives the
next ones. The backward pass makes the same round; from the second step on, the gradients of the keys and values
collected so far follow their keys by one step and so end up at home.

Shapes: B samples, N query heads, M key/value heads, S positions of this rank, H head dim, P sequences that go
around together, L ranks of a ring.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel.context import (
    DocumentEnds,
    Tile,
    check_documents,
    check_equal_chunks,
    ring_tiles,
)
from moesys.parallel.tile import attend, attend_backward, merge_
from moesys.plan.zigzag import ring_tokens


@dataclass
class _Transfer:
    """Tensors on their way; holds on to what is sent until it has left."""

    sent: Sequence[Tensor]
    received: Sequence[Tensor]
    works: list[dist.Work]

    def wait(self) -> Sequence[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


class Ring:
    """`peers`, ranks of `group`, in the order in which blocks go around; this rank is one of them."""

    def __init__(self, group: dist.ProcessGroup | None, peers: Sequence[int], rank: int) -> None:
        """`rank`: this rank's place among the peers. `group`: None where it is alone."""
        self.group, self.size, self.rank = group, len(peers), rank
        self.next = peers[(rank + 1) % self.size]
        self.previous = peers[rank - 1]

    def shift(self, tensors: Sequence[Tensor], rows: int) -> _Transfer:
        """Begin to send contiguous `tensors` [B, M, rows, H] to the next rank and to receive their like, of `rows` rows,
        from the previous one. What has no rows is neither sent nor received."""
        received = [x.new_empty(*x.shape[:2], rows, x.shape[3]) for x in tensors]
        ends = (dist.isend, self.next, tensors), (dist.irecv, self.previous, received)
        moves = [
            dist.P2POp(move, x, group=self.group, group_peer=peer)
            for move, peer, moved in ends
            for x in moved
            if x.numel()
        ]
        return _Transfer(tensors, received, dist.batch_isend_irecv(moves) if moves else [])

    def total(self, x_N: Tensor) -> Tensor:
        """The sum of the peers' x, of whole numbers: each adds them up in an order of its own. Collective over the peers."""
        total_N, block = x_N.clone(), x_N.clone()
        for _ in range(1, self.size):
            (block,) = self.shift([block.view(1, 1, 1, -1)], rows=1).wait()
            total_N += block.flatten()
        return total_N


class Round(NamedTuple):
    """Sequences on their way around a ring, together."""

    ring: Ring
    rows: slice
    """Of this rank's positions S those that are its own."""
    tokens: Sequence[int]
    """Of each rank of the ring: the rows of its block."""
    tiles: Sequence[tuple[Tile, ...]]
    """To compute in each step, with the keys of the rank so many places before this one."""

    def rows_in(self, step: int) -> int:
        """Of the block that is at hand in a step."""
        return self.tokens[(self.ring.rank - step) % self.ring.size]

    def blocks(self, block: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Every rank's, the own one first; the next is under way while one is worked on."""
        if self.ring.size > 1:
            block = [x.contiguous() for x in block]
        for step in range(1, self.ring.size):
            transfer = self.ring.shift(block, self.rows_in(step))
            yield block
            block = transfer.wait()
        yield block


def ring_round(
    ring: Ring, rows: slice, lengths: Sequence[int], ends: DocumentEnds | None = None
) -> Round:
    """Of sequences of so many tokens, cut by plan.zigzag; each rank has its parts one behind the other, and they go around as one
    block.

    Args:
        rows: of this rank.
        ends: of the documents in the sequence, if it is one.
    """
    tokens_PL = [ring_tokens(length, ring.size) for length in lengths]
    *begins_PL, all_L = np.cumsum([np.zeros_like(tokens_PL[0]), *tokens_PL], axis=0).tolist()
    sources = [(ring.rank - step) % ring.size for step in range(ring.size)]
    tiles = [
        tuple(
            tile.behind(begins_L[ring.rank], begins_L[source])
            for length, begins_L in zip(lengths, begins_PL, strict=True)
            for tile in ring_tiles(length, ring.rank, source, ring.size, ends)
        )
        for source in sources
    ]
    return Round(ring, rows, all_L, tiles)


class RingAttention:
    """An attention core for sequences that are shared out over all ranks of `group`.

    Sent by each rank, in bytes as profile.traffic counts them, where K and V are the numbers of elements of its keys and
    values (B * M * S * H each):

        forward    (size - 1) * (K + V) * bytes per element
        backward   that again, and (size - 1) * (K + V) * 4 for their gradients, which are summed in fp32
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ring = Ring(group, range(dist.get_world_size(group)), dist.get_rank(group))
        self.rank, self.size = self.ring.rank, self.ring.size

    def __call__(
        self, q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, ends: DocumentEnds | None = None
    ) -> Tensor:
        """Return [B, N, S, H]; with `ends`, of the whole sequences, a token sees its own document only.

        Raises ValueError for an odd S, and for documents that do not fill the whole sequences.
        """
        tokens = q_BNSH.shape[2]
        seq_len = tokens * self.size
        check_equal_chunks(seq_len, self.size)
        if ends is not None:
            check_documents(ends, q_BNSH.shape[0], seq_len)
        whole = ring_round(self.ring, slice(0, tokens), [seq_len], ends)
        return attend_in_rounds(q_BNSH, k_BMSH, v_BMSH, [whole])


def attend_in_rounds(
    q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, rounds: Sequence[Round]
) -> Tensor:
    """Attention [B, N, S, H] of positions each of which is in one of the rounds. Differentiable.

    Collective over the ranks of each ring. Ranks that meet in several rounds have these in the same order, also in
    backward: then the first that is not done anywhere is not waited for by its ranks in vain, and all end.
    """
    return _RingAttention.apply(q_BNSH, k_BMSH, v_BMSH, rounds)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, rounds: Sequence[Round]
    ) -> Tensor:
        q_BNSH, k_BMSH, v_BMSH = (x.contiguous() for x in (q_BNSH, k_BMSH, v_BMSH))
        out_BNSH = _zeros(q_BNSH)
        lse_BNS = torch.full_like(out_BNSH[..., 0], -torch.inf)
        for round in rounds:
            q, k, v, out, lse = _own(round, q_BNSH, k_BMSH, v_BMSH, out_BNSH, lse_BNS)
            _forward_round(round, q, (k, v), out, lse)
        out_BNSH = out_BNSH.to(q_BNSH.dtype)
        ctx.rounds = rounds
        ctx.save_for_backward(q_BNSH, k_BMSH, v_BMSH, out_BNSH, lse_BNS)
        return out_BNSH

    @staticmethod
    def backward(ctx, grad_BNSH: Tensor):  # type: ignore[override]
        saved = ctx.saved_tensors
        q_BNSH, k_BMSH, v_BMSH = saved[:3]
        grads = [_zeros(x) for x in (q_BNSH, k_BMSH, v_BMSH)]
        for round in ctx.rounds:
            q, k, v, *of_output = _own(round, *saved, grad_BNSH.contiguous())
            _backward_round(round, q, (k, v), of_output, _own(round, *grads))
        dtypes = (x.dtype for x in (q_BNSH, k_BMSH, v_BMSH))
        return *(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)), None


def _own(round: Round, *tensors: Tensor) -> list[Tensor]:
    """The rows of a round, of tensors [B, heads, S, ...]."""
    return [x[:, :, round.rows] for x in tensors]


def _forward_round(
    round: Round, q: Tensor, block: tuple[Tensor, Tensor], out: Tensor, lse: Tensor
) -> None:
    """Attention of this rank's rows `q`, into `out` and `lse`."""
    for (k, v), tiles in zip(round.blocks(block), round.tiles, strict=True):
        for tile in tiles:
            rows, keys = tile.at_queries, tile.at_keys
            partial, partial_lse = attend(q[rows], k[keys], v[keys], tile.is_causal)
            merge_(out[rows], lse[rows], partial, partial_lse)


def _backward_round(
    round: Round,
    q: Tensor,
    block: tuple[Tensor, Tensor],
    of_output: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> None:
    """Add to the gradients `grads` of this rank's queries, keys and values; of the latter all ranks find parts.

    `of_output`: the output, its log-sum-exp and its gradient.
    """
    out, lse, grad = of_output
    grad_q, *at_home = grads
    transfer: _Transfer | None = None
    for step, ((k, v), tiles) in enumerate(zip(round.blocks(block), round.tiles, strict=True)):
        grad_k, grad_v = (_zeros(k), _zeros(v)) if step else at_home
        for tile in tiles:
            rows, keys = tile.at_queries, tile.at_keys
            tile_grads = attend_backward(
                grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], tile.is_causal
            )
            places = grad_q[rows], grad_k[keys], grad_v[keys]
            for place, tile_grad in zip(places, tile_grads, strict=True):
                place += tile_grad
        if transfer is not None:
            _add_((grad_k, grad_v), transfer)
        if step:
            transfer = round.ring.shift((grad_k, grad_v), round.rows_in(step + 1))
    if transfer is not None:
        _add_(at_home, transfer)


def _add_(grads: Sequence[Tensor], transfer: _Transfer) -> None:
    """Add what the ranks before this one found for the same keys and values."""
    for grad, received in zip(grads, transfer.wait(), strict=True):
        grad += received


def _zeros(x: Tensor) -> Tensor:
    """To sum in: at least fp32, dense."""
    return x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
