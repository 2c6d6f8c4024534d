"""Attention over pieces of sequences of any length, each on any ranks (hybrid data parallelism, ByteScale, 2502.21231).

Each sequence goes around the ring of its ranks alone, those on the same ranks as one block; one that a rank has whole is not
sent. All rings are in one group, so that no plan needs a new one.

Shapes: N query heads, M key/value heads, T rows of this rank, H head dim, L ranks of a ring.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch.distributed as dist
from torch import Tensor

from moesys.parallel.ring import Ring, Round, attend_in_rounds, ring_round
from moesys.plan.batch.local import LocalPieces


class PieceAttention:
    """An attention core for pieces of sequences, on ranks of `group`.

    Sent by each rank, of a sequence that L ranks share: (L - 1) / L of its keys and values, and of their gradients, as
    `ring.RingAttention` says; nothing of one that it has whole.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        # The layers of a micro-step ask for the same, and so does their backward.
        self._rounds = lru_cache(maxsize=2)(self._make_rounds)

    def __call__(
        self, q_1NTH: Tensor, k_1MTH: Tensor, v_1MTH: Tensor, pieces: LocalPieces
    ) -> Tensor:
        """Return [1, N, T, H]: a token sees those up to its own of its sequence; 0 in rows without one. Collective over the ranks of each piece.

        Raises ValueError for tensors of another number of rows.
        """
        if q_1NTH.shape[2] != pieces.num_rows:
            raise ValueError(
                f"pieces of {pieces.num_rows} rows were given for {q_1NTH.shape[2]} queries"
            )
        return attend_in_rounds(q_1NTH, k_1MTH, v_1MTH, self._rounds(pieces))

    def _make_rounds(self, pieces: LocalPieces) -> Sequence[Round]:
        rounds = []
        both = zip(pieces.pieces, pieces.rows, strict=True)
        for ranks, alike in groupby(both, key=lambda piece: piece[0].ranks):
            members, rows = zip(*alike, strict=True)
            ring = Ring(self.group, ranks, members[0].rank)
            own = slice(rows[0].start, rows[-1].stop)
            rounds.append(ring_round(ring, own, [piece.length for piece in members]))
        return rounds
