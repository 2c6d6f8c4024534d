"""Lengths of batches: cut and counted off without losing a token, made up as their distributions say.

Shapes: S sequences.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.plan.batch.lengths import DISTRIBUTIONS, cut, drawn, first
from tests.plan.placements import seeds


@given(seeds(), st.integers(1, 50))
def test_cut_sequences_have_all_tokens_in_order(rng: np.random.Generator, longest: int) -> None:
    lengths_S = rng.integers(1, 200, int(rng.integers(0, 20)))
    expected: list[int] = []
    for length in lengths_S.tolist():
        expected += [longest] * (length // longest)
        expected += [length % longest] if length % longest else []
    assert cut(lengths_S, longest).tolist() == expected


def test_a_batch_has_no_more_tokens_than_asked_for_but_one_sequence() -> None:
    assert first(np.array([5, 3, 4]), 8).tolist() == [5, 3]
    assert first(np.array([5, 3, 4]), 7).tolist() == [5]
    assert first(np.array([5, 3, 4]), 2).tolist() == [5]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_drawn_lengths_fill_the_batch_the_same_every_time(distribution: str) -> None:
    lengths_S = drawn(distribution, 10**6, 4096, seed=3)
    assert 10**6 - 4096 < lengths_S.sum() <= 10**6
    assert 1 <= lengths_S.min() <= lengths_S.max() <= 4096
    assert lengths_S.tolist() == drawn(distribution, 10**6, 4096, seed=3).tolist()
    other = drawn(distribution, 10**6, 4096, seed=4)
    assert (other.tolist() == lengths_S.tolist()) == (distribution == "equal")


def test_distributions_are_what_they_are_called() -> None:
    longest = 2**20
    of = {name: drawn(name, 2**32, longest, seed=0) for name in DISTRIBUTIONS}
    assert set(of["equal"]) == {longest}
    assert of["uniform"].mean() == pytest.approx(longest / 2, rel=0.05)
    assert np.median(of["lognormal"]) == pytest.approx(longest / 64, rel=0.05)
    logs_S = np.log(of["lognormal"])
    assert logs_S.std() == pytest.approx(1.0, rel=0.05)
    # As many tokens in each octave.
    octave_S = np.floor(np.log2(longest / of["heavy_tail"])).clip(0, 8)
    shares = [of["heavy_tail"][octave_S == octave].sum() for octave in range(9)]
    assert shares == pytest.approx(np.full(9, np.mean(shares)), rel=0.2)
