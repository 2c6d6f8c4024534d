"""Which source stands where: exact shares at every prefix, whatever the weights and wherever they turn."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.data.mix import PARTS, Mix, Stretch, parts_of

WEIGHTS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9)


def counted(mix: Mix, first: int, stop: int) -> np.ndarray:
    """How often each source was read in [first, k), for k from first to stop: int [stop - first + 1, N]."""
    sources, _ = mix.at(np.arange(first, stop))
    is_of = sources[:, None] == np.arange(len(mix.weights_N))
    return np.concatenate([np.zeros((1, is_of.shape[1]), int), is_of.cumsum(0)])


@settings(max_examples=150)
@given(WEIGHTS)
def test_weights_become_whole_parts(weights: list[float]) -> None:
    parts = parts_of(weights)
    assert sum(parts) == PARTS
    assert min(parts) >= 1
    rounded_up = sum(w / sum(weights) * PARTS < 1 for w in weights)
    for weight, part in zip(weights, parts, strict=True):
        assert abs(part - weight / sum(weights) * PARTS) < 1 + rounded_up


@settings(max_examples=100)
@given(WEIGHTS, st.integers(1, 400))
def test_every_prefix_has_the_exact_shares_within_one_sample(weights: list[float], length: int):
    mix = Mix.of(weights)
    (stretch,) = mix.stretches
    counts_KN = counted(mix, 0, length)
    exact_KN = np.arange(length + 1)[:, None] * np.array(stretch.parts_N)  # of PARTS
    assert (np.abs(counts_KN * PARTS - exact_KN) < PARTS).all()
    assert tuple(counts_KN[-1]) == mix.counts_at(length)


def test_the_largest_deficit_would_stray_further() -> None:
    """Why the rule is another one: these weights, and the source with the largest deficit first."""
    weights = [0.7636, 0.7457, 0.0704, 0.0474, 0.0289, 0.0285, 0.0157, 0.0102]
    parts = np.array(parts_of(weights))
    counts, worst = np.zeros(8, dtype=int), 0.0
    for k in range(1, 2000):
        counts[np.argmax(k * parts - counts * PARTS)] += 1
        worst = max(worst, np.abs(counts - k * parts / PARTS).max())
    assert worst > 1.05
    counts_KN = counted(Mix.of(weights), 0, 2000)
    assert np.abs(counts_KN - np.arange(2001)[:, None] * parts / PARTS).max() < 1


@settings(max_examples=60)
@given(st.data())
def test_places_count_up_within_each_source_through_every_turn(data: st.DataObject) -> None:
    num_sources = data.draw(st.integers(1, 4))
    weights = st.lists(st.floats(0.01, 1), min_size=num_sources, max_size=num_sources)
    turns = sorted(data.draw(st.lists(st.integers(0, 250), max_size=4)))
    mix = Mix.of(data.draw(weights))
    for position in turns:
        mix = mix.turned(position, data.draw(weights))
    positions = np.arange(300)
    sources, places = mix.at(positions)
    for source in range(num_sources):
        assert (places[sources == source] == np.arange((sources == source).sum())).all()
    # In each stretch the shares are those of its weights.
    ends = [s.first for s in mix.stretches[1:]] + [300]
    for stretch, end in zip(mix.stretches, ends, strict=True):
        counts_KN = counted(mix, stretch.first, end)
        exact_KN = np.arange(len(counts_KN))[:, None] * np.array(stretch.parts_N)
        assert (np.abs(counts_KN * PARTS - exact_KN) < PARTS).all()
    # Any positions, in any order, asked of a mix that was stored in between.
    again = Mix.from_json(json.loads(json.dumps(mix.to_json())), num_sources)
    some = np.array(data.draw(st.lists(st.integers(0, 299), min_size=1)))
    assert (again.at(some)[0] == sources[some]).all()
    assert (again.at(some)[1] == places[some]).all()
    assert again.counts_at(257) == tuple(counted(mix, 0, 257)[-1])


def test_the_order_is_as_it_was() -> None:
    """Recorded: another order would change what a resumed run reads."""
    sources, places = Mix.of([7, 3]).at(np.arange(12))
    assert sources.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert places.tolist() == [0, 1, 0, 2, 3, 1, 4, 5, 6, 2, 7, 8]
    sources, _ = Mix.of([0.5, 0.3, 0.2]).at(np.arange(10))
    assert sources.tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]


def test_far_positions_are_found_at_once_and_a_period_is_exact() -> None:
    mix = Mix.of([0.7, 0.3])
    sources, places = mix.at(np.array([10 * 2**40, 10 * 2**40 + 2]))
    assert sources.tolist() == [0, 1]
    assert places.tolist() == [7 * 2**40, 3 * 2**40]
    assert mix.counts_at(10 * 2**40 + 3) == (7 * 2**40 + 2, 3 * 2**40 + 1)


def test_the_same_weights_again_are_no_turn_and_a_turn_at_the_same_place_replaces() -> None:
    mix = Mix.of([1, 1])
    assert mix.turned(8, [3, 3]) is mix
    twice = mix.turned(8, [1, 3]).turned(8, [3, 1])
    assert twice.stretches == (*mix.stretches, Stretch(8, (4, 4), (750_000, 250_000)))
    assert all(a.first < b.first for a, b in pairwise(twice.stretches))


@pytest.mark.parametrize(
    "stored",
    [
        *(None, [], 3, [[0, [0, 0]]], [[0, [0, 0], [1, 1]]], [[4, [2, 2], [500_000, 500_000]]]),
        [[0, [0, 0], [PARTS, 0]]],
        [[0, [0, 0, 0], [500_000, 500_000]]],
        [[0, [0, 0], [500_000, 500_000]], [4, [2, 3], [500_000, 500_000]]],
        [[0, [0, 0.0], [500_000, 500_000]]],
        [[0, [0, True], [500_000, 500_000]]],
    ],
)
def test_a_senseless_stored_mix_is_refused(stored: object) -> None:
    with pytest.raises(ValueError, match="mix is "):
        Mix.from_json(stored, 2)
