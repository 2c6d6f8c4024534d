"""Runs of sequences in order of length: cut as well as any cut there is.

Shapes: N sequences.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moesys.plan.batch.length_runs import MOST_PLACES, length_buckets, token_runs
from moesys.plan.placement import Integers
from tests.plan.placements import seeds


def random_lengths(rng: np.random.Generator, number: int) -> Integers:
    """The longest first."""
    return np.sort(1 + (rng.exponential(size=number) ** 2 * 100).astype(np.int64))[::-1]


def cuts(number: int, most_runs: int) -> Iterator[list[slice]]:
    """All there are."""
    for runs in range(1, most_runs + 1):
        for ends in itertools.combinations(range(1, number), runs - 1):
            yield [slice(*pair) for pair in itertools.pairwise((0, *ends, number))]


def most_tokens(lengths_N: Integers, runs: list[slice]) -> int:
    return max((int(lengths_N[run].sum()) for run in runs), default=0)


def short_of_longest(lengths_N: Integers, runs: list[slice]) -> int:
    return sum(int((lengths_N[run].max() - lengths_N[run]).sum()) for run in runs)


def covers(runs: list[slice], number: int) -> bool:
    return [n for run in runs for n in range(run.start, run.stop)] == [*range(number)]


@given(seeds(), st.integers(1, 9), st.integers(1, 4))
def test_runs_are_the_best_cut(rng: np.random.Generator, number: int, most_runs: int) -> None:
    lengths_N = random_lengths(rng, number)
    for cut, amount in ((token_runs, most_tokens), (length_buckets, short_of_longest)):
        runs = cut(lengths_N, most_runs)
        assert covers(runs, number)
        assert len(runs) <= most_runs
        assert amount(lengths_N, runs) == min(
            amount(lengths_N, others) for others in cuts(number, most_runs)
        )


def test_of_no_sequences_there_is_no_run() -> None:
    assert token_runs(np.zeros(0, dtype=np.int64), 3) == []
    assert length_buckets(np.zeros(0, dtype=np.int64), 3) == []


def test_many_sequences_are_cut_nearly_as_well() -> None:
    lengths_N = random_lengths(np.random.default_rng(0), 20 * MOST_PLACES)
    runs = length_buckets(lengths_N, 16)
    assert covers(runs, len(lengths_N))
    # A sixteenth of the range, on average half of it, if lengths were even.
    even = int(lengths_N.max()) / 32 * len(lengths_N)
    assert short_of_longest(lengths_N, runs) < even
