"""Ring attention (2310.01889): each rank keeps its queries, and the keys and values go around.

Every rank holds the positions that `context.local_positions` gives it. In each of `size` steps it computes its
queries' tiles with the keys it has at hand, while it already passes these on to the next rank and receives the
next ones. The backward pass makes the same round; from the second step on, the gradients of the keys and values
collected so far follow their keys by one step and so end up at home.

Shapes: B samples, N query heads, M key/value heads, S positions of this rank, H head dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.parallel.context import DocumentEnds, Tile, check_documents, ring_tiles
from moesys.parallel.tile import attend, attend_backward, merge_

Steps = list[tuple[Tile, ...]]
"""The tiles to compute in each step of the round."""


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


class RingAttention:
    """An attention core for sequences that are shared out over `peers`, ranks of `group` in the ring's order.

    Without `peers`, all ranks of the group. Sent by each rank, in bytes as profile.traffic counts them, where K and V are the
    numbers of elements of its keys and values (B * M * S * H each):

        forward    (size - 1) * (K + V) * bytes per element
        backward   that again, and (size - 1) * (K + V) * 4 for their gradients, which are summed in fp32
    """

    def __init__(self, group: dist.ProcessGroup, peers: Sequence[int] | None = None) -> None:
        peers = list(range(dist.get_world_size(group)) if peers is None else peers)
        self.group = group
        self.size = len(peers)
        self.rank = peers.index(dist.get_rank(group))
        self.next = peers[(self.rank + 1) % self.size]
        self.previous = peers[self.rank - 1]

    def __call__(
        self, q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, ends: DocumentEnds | None = None
    ) -> Tensor:
        """Return [B, N, S, H]; with `ends`, of the whole sequences, a token sees its own document only.

        Raises ValueError for an odd S, and for documents that do not fill the whole sequences.
        """
        seq_len = q_BNSH.shape[2] * self.size
        if ends is not None:
            check_documents(ends, q_BNSH.shape[0], seq_len)
        steps = [
            ring_tiles(seq_len, self.rank, (self.rank - step) % self.size, self.size, ends)
            for step in range(self.size)
        ]
        return _RingAttention.apply(q_BNSH, k_BMSH, v_BMSH, self, steps)

    def shift(self, tensors: Sequence[Tensor]) -> _Transfer:
        """Begin to send contiguous `tensors` to the next rank and to receive their like from the previous one."""
        received = [torch.empty_like(x) for x in tensors]
        sends = [dist.P2POp(dist.isend, x, group=self.group, group_peer=self.next) for x in tensors]
        receives = [
            dist.P2POp(dist.irecv, x, group=self.group, group_peer=self.previous) for x in received
        ]
        return _Transfer(tensors, received, dist.batch_isend_irecv([*sends, *receives]))

    def round(self, block: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Yield every rank's block, the own one first; the next is under way while one is worked on."""
        for _ in range(self.size - 1):
            transfer = self.shift(block)
            yield block
            block = transfer.wait()
        yield block


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, ring: RingAttention, steps: Steps
    ):
        q_BNSH, k_BMSH, v_BMSH = (x.contiguous() for x in (q_BNSH, k_BMSH, v_BMSH))
        out_BNSH = _zeros(q_BNSH)
        lse_BNS = torch.full_like(out_BNSH[..., 0], -torch.inf)
        for (k, v), tiles in zip(ring.round((k_BMSH, v_BMSH)), steps, strict=True):
            for tile in tiles:
                rows, keys = tile.at_queries, tile.at_keys
                partial, lse = attend(q_BNSH[rows], k[keys], v[keys], tile.is_causal)
                merge_(out_BNSH[rows], lse_BNS[rows], partial, lse)
        out_BNSH = out_BNSH.to(q_BNSH.dtype)
        ctx.ring, ctx.steps = ring, steps
        ctx.save_for_backward(q_BNSH, k_BMSH, v_BMSH, out_BNSH, lse_BNS)
        return out_BNSH

    @staticmethod
    def backward(ctx, grad_BNSH: Tensor):  # type: ignore[override]
        q_BNSH, k_BMSH, v_BMSH, out_BNSH, lse_BNS = ctx.saved_tensors
        grad_BNSH = grad_BNSH.contiguous()
        grad_q = _zeros(q_BNSH)
        at_home: tuple[Tensor, Tensor] | None = None
        transfer: _Transfer | None = None
        for (k, v), tiles in zip(ctx.ring.round((k_BMSH, v_BMSH)), ctx.steps, strict=True):
            grad_k, grad_v = _zeros(k), _zeros(v)
            for tile in tiles:
                rows, keys = tile.at_queries, tile.at_keys
                tile_grads = attend_backward(
                    grad_BNSH[rows],
                    q_BNSH[rows],
                    k[keys],
                    v[keys],
                    out_BNSH[rows],
                    lse_BNS[rows],
                    tile.is_causal,
                )
                places = grad_q[rows], grad_k[keys], grad_v[keys]
                for place, tile_grad in zip(places, tile_grads, strict=True):
                    place += tile_grad
            if at_home is None:
                at_home = grad_k, grad_v
                continue
            if transfer is not None:
                _add_(grad_k, grad_v, transfer)
            transfer = ctx.ring.shift((grad_k, grad_v))
        assert at_home is not None
        if transfer is not None:
            _add_(*at_home, transfer)
        grad_k, grad_v = at_home
        return grad_q.to(q_BNSH.dtype), grad_k.to(k_BMSH.dtype), grad_v.to(v_BMSH.dtype), None, None


def _add_(grad_k: Tensor, grad_v: Tensor, transfer: _Transfer) -> None:
    """Add what the ranks before this one found for the same keys."""
    received_k, received_v = transfer.wait()
    grad_k += received_k
    grad_v += received_v


def _zeros(x: Tensor) -> Tensor:
    """To sum in: at least fp32, dense."""
    return x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
