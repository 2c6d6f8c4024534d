"""Lengths of the sequences of a batch: cut, counted off, or made up where there is no data yet. Pure.

Shapes: S sequences, U numbers drawn.
"""

from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np

from moesys.plan.placement import Amounts, Integers

_SHORTEST, _MEDIAN = 1 / 512, 1 / 64
_DRAWN = 4096


def _lognormal(uniform_U: Amounts) -> Amounts:
    return _MEDIAN * np.exp([NormalDist().inv_cdf(max(u, 1e-12)) for u in uniform_U.tolist()])


DISTRIBUTIONS: Mapping[str, Callable[[Amounts], Amounts]] = {
    "equal": np.ones_like,
    "uniform": lambda uniform_U: uniform_U,
    "lognormal": _lognormal,
    "heavy_tail": lambda uniform_U: _SHORTEST / (1 - uniform_U * (1 - _SHORTEST)),
}
"""Lengths over the longest, of numbers that are even in [0, 1). lognormal has a median of 1/64 and a sigma of 1; heavy_tail has as
many tokens in sequences of 1/512 to 1/256 of the longest as in those of 1/256 to 1/128, and so on to 1/2 to 1."""


def drawn(distribution: str, tokens: int, longest: int, seed: int) -> Integers:
    """int64 [S]: as many as have at most `tokens` together, at least one."""
    rng = np.random.default_rng(seed)
    lengths_S = np.zeros(0, dtype=np.int64)
    while lengths_S.sum() < tokens:
        share_U = DISTRIBUTIONS[distribution](rng.random(_DRAWN))
        more_U = np.clip(np.ceil(longest * share_U), 1, longest).astype(np.int64)
        lengths_S = np.concatenate([lengths_S, more_U])
    return first(lengths_S, tokens)


def first(lengths_S: Integers, tokens: float) -> Integers:
    """As many as have at most `tokens` together, at least one."""
    return lengths_S[: max(1, int(np.searchsorted(np.cumsum(lengths_S), tokens, side="right")))]


def cut(lengths_S: Integers, longest: int) -> Integers:
    """Each of more than `longest` tokens in sequences of so many, and one of the rest."""
    whole_S, rest_S = np.divmod(lengths_S, longest)
    number_S = whole_S + (rest_S > 0)
    cut_S = np.full(int(number_S.sum()), longest, dtype=np.int64)
    cut_S[np.cumsum(number_S)[rest_S > 0] - 1] = rest_S[rest_S > 0]
    return cut_S
