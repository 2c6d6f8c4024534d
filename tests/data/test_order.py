"""The order is a permutation, fixed by its keys, and looks random."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moesys.data.order import permute


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_every_sample_exactly_once(num_samples: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(num_samples), num_samples, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(order), np.arange(num_samples))


def test_the_order_never_changes() -> None:
    # A checkpoint relies on it: these figures are part of the format.
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [3, 8, 9, 2, 0, 5, 4, 7, 1, 6]
    assert permute(np.arange(3), 10**12, seed=7, epoch=5).tolist() == [
        161977836178,
        658179340746,
        508179607826,
    ]


def test_positions_may_be_asked_for_in_any_pieces() -> None:
    whole = permute(np.arange(1000), 1000, seed=3, epoch=1)
    some = np.array([999, 0, 17, 17])
    assert np.array_equal(permute(some, 1000, seed=3, epoch=1), whole[some])


def test_looks_random_over_epochs_and_seeds() -> None:
    """Chi-square of where position 0 points, and of the step to position 1; 6 sigma."""
    size, draws = 50, 3000
    for keys in ([(e, 0) for e in range(draws)], [(0, s) for s in range(draws)]):
        drawn = np.array([permute(np.arange(2), size, seed=s, epoch=e) for e, s in keys])
        steps = (drawn[:, 1] - drawn[:, 0]) % size - 1  # never 0: two positions differ
        for values, bins in ((drawn[:, 0], size), (steps, size - 1)):
            expected = draws / bins
            chi_square = ((np.bincount(values, minlength=bins) - expected) ** 2 / expected).sum()
            assert abs(chi_square - (bins - 1)) < 6 * np.sqrt(2 * (bins - 1))


def test_one_order_looks_random() -> None:
    """Neighbours of one epoch: no correlation, no fixed points beyond chance."""
    size = 100_003
    order = permute(np.arange(size), size, seed=1, epoch=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 6 / np.sqrt(size)
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 6 / np.sqrt(size)
    assert (order == np.arange(size)).sum() < 10
