"""How long the documents of a batch are, as an index says it. Reads no text.

Shapes: D documents of a source, B places in their order.
"""

import os
from collections.abc import Mapping

import numpy as np

from moesys.data.indexed import IndexedTokens
from moesys.data.order import permute
from moesys.plan.batch.lengths import first

_READ = 4096


def document_lengths(
    prefixes: Mapping[str, str | os.PathLike[str]],
    weights: Mapping[str, float],
    tokens: int,
    *,
    seed: int,
    shuffle: bool,
) -> np.ndarray:
    """int64: inputs of whole documents, of each source about its share of `tokens`, one at least; n tokens are n - 1 inputs.

    Args:
        prefixes: of .idx and .bin, by source.
        shuffle: in the order that the seed gives; False = front to back.

    Raises:
        ValueError: an index that is missing or damaged.
    """
    total = sum(weights.values())
    return np.concatenate(
        [
            _of_source(IndexedTokens(prefix), tokens * weights[name] / total, seed, shuffle)
            for name, prefix in prefixes.items()
        ]
    )


def _of_source(source: IndexedTokens, tokens: float, seed: int, shuffle: bool) -> np.ndarray:
    inputs_D = np.maximum(np.diff(source.document_offsets) - 1, 0)
    found_B = np.zeros(0, dtype=np.int64)
    for begin in range(0, len(inputs_D), _READ):
        places_B = np.arange(begin, min(begin + _READ, len(inputs_D)))
        if shuffle:
            places_B = permute(places_B, len(inputs_D), seed=seed, epoch=0)
        found_B = np.concatenate([found_B, inputs_D[places_B]])
        if found_B.sum() >= tokens:
            break
    return first(found_B[found_B > 0], tokens)
