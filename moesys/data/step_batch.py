"""What a rank computes in an optimizer step, and how much all ranks do together.

Shapes: B samples of S positions on this rank (pieces of sequences: B = 1, their T tokens), N targets ahead of a token, L sequences
of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from moesys.plan.batch.local import LocalPieces


@dataclass(frozen=True, kw_only=True)
class RankBatch:
    """Fed to one forward."""

    input_ids_BS: Tensor
    """int64."""
    targets_BSN: Tensor
    """int64: the tokens after each input, IGNORED_TARGET where its sequence has ended."""
    places_BS: Tensor
    """int64, of each token among all of the step."""
    document_ids_BS: Tensor | None = None
    """int64, of samples whole, if attention stays inside documents."""
    pieces: LocalPieces | None = None
    """Of which sequences the tokens are; None = samples of equal length."""

    def fed(self, device: torch.device) -> dict[str, Any]:
        """As models.Transformer.forward takes it, by name."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("places_BS", "targets_BSN")
        }
        ids_BS = self.input_ids_BS.to(device, non_blocking=True)
        return {"ids_BS": ids_BS, "documents": self.document_ids_BS, "pieces": self.pieces} | moved


def empty_batch(mtp_depth: int) -> RankBatch:
    """Of no sequence."""
    no_ids_BS = torch.zeros(1, 0, dtype=torch.int64)
    return RankBatch(
        input_ids_BS=no_ids_BS,
        targets_BSN=no_ids_BS[..., None].expand(-1, -1, 1 + mtp_depth),
        places_BS=no_ids_BS,
        pieces=LocalPieces(()),
    )


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """A step's micro-batches of one rank."""

    micro_batches: Sequence[RankBatch]
    lengths_L: np.ndarray
    """Tokens of each sequence of the step, over all ranks."""

    @property
    def num_tokens(self) -> int:
        """Over all ranks."""
        return int(self.lengths_L.sum())

    @property
    def mean_length_tokens(self) -> float:
        """Of the sequence that a token is in, mean over tokens."""
        return float(np.average(self.lengths_L, weights=self.lengths_L))

    def filled(self, number: int, mtp_depth: int) -> Self:
        """With micro-batches of no sequence behind the others, so many together."""
        empty = [empty_batch(mtp_depth)] * (number - len(self.micro_batches))
        return replace(self, micro_batches=[*self.micro_batches, *empty])

    def tokens_ahead(self, depth: int) -> int:
        """That multi-token prediction of so many depths has a target for: the k-th none for the last k of a sequence."""
        return sum(int((self.lengths_L - k).clip(0).sum()) for k in range(1, depth + 1))
