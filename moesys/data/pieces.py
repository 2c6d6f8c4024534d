"""The tokens of what one rank has of a micro-step.

Shapes: T rows of the rank, N targets ahead of a token, S sequences of a step.
"""

from collections.abc import Sequence

import numpy as np
import torch

from moesys.data.step_batch import RankBatch
from moesys.ops.cross_entropy import IGNORED_TARGET
from moesys.plan.batch.local import LocalPieces
from moesys.plan.batch.plan import MicroStep, of_rank
from moesys.plan.placement import Integers


def rank_batch(
    step: MicroStep,
    lengths_S: Integers,
    rank: int,
    tokens_S: Sequence[np.ndarray],
    mtp_depth: int = 0,
    multiple_of: int = 1,
) -> RankBatch:
    """Of `rank`. `tokens_S`: of each sequence its inputs and the token after the last of them.

    A target further ahead than that is of no sequence, and ignored. Rows without a token, up to a multiple of `multiple_of`,
    have token 0 and no target.
    """
    local = LocalPieces.of_plan(step, lengths_S, rank, multiple_of)
    firsts_S = np.cumsum(lengths_S) - lengths_S
    own = [piece.sequence for piece in of_rank(step, rank)]
    num_rows, depth = local.num_rows, 1 + mtp_depth
    ids_T = np.zeros(num_rows, dtype=np.int64)
    targets_TN = np.full((num_rows, depth), IGNORED_TARGET, dtype=np.int64)
    places_T = np.zeros(num_rows, dtype=np.int64)
    for sequence, piece, rows in zip(own, local.pieces, local.rows, strict=True):
        at = rows.start
        for chunk in piece.chunks:
            here = slice(at, at + len(chunk))
            ids_T[here] = tokens_S[sequence][chunk.start : chunk.stop]
            places_T[here] = firsts_S[sequence] + np.arange(chunk.start, chunk.stop)
            for ahead in range(1, depth + 1):
                found = tokens_S[sequence][chunk.start + ahead : chunk.stop + ahead]
                targets_TN[at : at + len(found), ahead - 1] = found
            at += len(chunk)
    return RankBatch(
        input_ids_BS=torch.from_numpy(ids_T)[None],
        targets_BSN=torch.from_numpy(targets_TN)[None],
        places_BS=torch.from_numpy(places_T)[None],
        pieces=local,
    )
