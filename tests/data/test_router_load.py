"""Weights from router loads: against numpy in the paper's words, and what holds for any loads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.data.router_load import Distance, distances, updated_weights

DISTANCES: list[Distance] = ["cosine", "l2"]


def by_numpy(weights, loads, eta, c, distance):
    """Algorithm and code of 2406.11256, in fp64."""
    loads = np.array(loads, dtype=np.float64)
    loads = loads / loads.sum(axis=1, keepdims=True)
    if distance == "cosine":
        normalized = loads / np.linalg.norm(loads, axis=1, keepdims=True)
        delta = 1.0 - (normalized @ normalized.T).mean(axis=1)
    else:
        delta = np.linalg.norm(loads[:, None] - loads[None], axis=2).mean(axis=1)
    alpha = np.array(weights) * np.exp(eta * delta)
    alpha = alpha / alpha.sum()
    return (1 - c) * alpha + c / len(alpha)


@st.composite
def cases(draw: st.DrawFn):
    num_sources, num_experts = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    slots = st.lists(st.integers(0, 10**6), min_size=num_experts, max_size=num_experts)
    loads = draw(
        st.lists(slots.filter(any), min_size=num_sources, max_size=num_sources), label="loads"
    )
    weight = st.floats(1e-6, 1.0)
    weights = draw(st.lists(weight, min_size=num_sources, max_size=num_sources), label="weights")
    options = {
        "eta": draw(st.floats(0.01, 50)),
        "smoothing": draw(st.floats(1e-4, 0.99)),
        "distance": draw(st.sampled_from(DISTANCES)),
    }
    return weights, loads, options


@settings(max_examples=150)
@given(cases())
def test_it_is_the_papers_formula(case) -> None:
    weights, loads, options = case
    ours = updated_weights(weights, loads, **options)
    theirs = by_numpy(weights, loads, options["eta"], options["smoothing"], options["distance"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@settings(max_examples=150)
@given(cases(), st.randoms())
def test_sum_floor_and_order(case, random) -> None:
    weights, loads, options = case
    found = updated_weights(weights, loads, **options)
    assert sum(found) == pytest.approx(1.0, abs=1e-12)
    assert min(found) >= options["smoothing"] / len(found) * (1 - 1e-12)
    order = list(range(len(weights)))
    random.shuffle(order)
    moved = updated_weights([weights[i] for i in order], [loads[i] for i in order], **options)
    assert moved == pytest.approx([found[i] for i in order], rel=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_source_that_is_unlike_the_others_gains(distance: Distance) -> None:
    loads = [[90, 10, 0], [80, 20, 0], [0, 10, 90]]
    far = distances(loads, distance)
    assert max(far) == far[2]
    options = {"eta": 10.0, "smoothing": 0.05, "distance": distance}
    found = updated_weights([1 / 3] * 3, loads, **options)
    assert found[2] > 1 / 3 > max(found[:2])
    # More slots of the same shares change nothing; the same load everywhere only smooths.
    assert distances([[9, 1, 0], *loads[1:]], distance) == pytest.approx(far)
    alike = updated_weights([0.7, 0.3], [[5, 3], [50, 30]], **options)
    assert alike == pytest.approx([0.95 * 0.7 + 0.025, 0.95 * 0.3 + 0.025])


def test_one_update_by_hand() -> None:
    # Shares (1, 0) and (0, 1): the cosine distance to oneself is 0, to the other 1, so each mean is 1/2.
    assert distances([[4, 0], [0, 9]], "cosine") == [0.5, 0.5]
    assert distances([[4, 0], [0, 9]], "l2") == pytest.approx([2**0.5 / 2] * 2)
    assert distances([[0, 0], [0, 9]], "cosine") == [1.0, 0.5]
