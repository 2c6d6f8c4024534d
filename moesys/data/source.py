"""A source of training text: a stream of tokens with a name and a weight, and the endless order of its samples.

Shapes: N tokens in the stream, B samples asked for.
"""

from dataclasses import dataclass

import numpy as np
import xxhash

from moesys.data.indexed import IndexedTokens
from moesys.data.order import permute


@dataclass(frozen=True, kw_only=True)
class Source:
    tokens: IndexedTokens
    name: str = ""
    """"" = the only one."""
    weight: float = 1.0
    """Of its samples among those of all sources; only the ratios count."""

    def num_samples(self, seq_len: int) -> int:
        """Per epoch. The last (N - 1) % seq_len tokens of the stream are not read."""
        return max(0, len(self.tokens) - 1) // seq_len


class SourceOrder:
    """Which sample each place of a source's own order is: a permutation for every epoch, one after another."""

    def __init__(self, source: Source, *, num_samples: int, seed: int, shuffle: bool) -> None:
        self.num_samples = num_samples
        """Per epoch."""
        # By name, so that sources beside it change nothing; equal lengths shall not mean equal orders.
        self._seed = seed ^ xxhash.xxh3_64_intdigest(source.name.encode()) if source.name else seed
        self._shuffle = shuffle

    def samples_at(self, places_B: np.ndarray) -> np.ndarray:
        """int64 [B]."""
        epochs_B, within_B = np.divmod(places_B, self.num_samples)
        if not self._shuffle:
            return within_B
        samples_B = np.empty_like(within_B)
        for epoch in np.unique(epochs_B):
            here = epochs_B == epoch
            samples_B[here] = permute(
                within_B[here], self.num_samples, seed=self._seed, epoch=int(epoch)
            )
        return samples_B
