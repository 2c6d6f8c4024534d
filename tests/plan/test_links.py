"""Latency and rate of a link, from times: exact ones, those of a noisy machine, and those that tell nothing."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.plan.links import Link, Links, Timed, fitted_link

SIZES = [8.0**power for power in range(4, 9)]


def timed(link: Link, noise_R: list[list[float]] | None = None) -> list[Timed]:
    """Of each size; times of repeats are those of the link times what is given."""
    noise = noise_R or [[1.0]] * len(SIZES)
    return [
        Timed(size, [link.seconds(size) * factor for factor in factors])
        for size, factors in zip(SIZES, noise, strict=True)
    ]


@given(st.floats(1e-6, 1e-2), st.floats(1e5, 1e12))
def test_a_line_is_found_again(latency_s: float, bytes_per_s: float) -> None:
    """As far as times tell it: a latency that is nothing beside the bytes of the smallest, or bytes beside it, are lost."""
    link = Link(latency_s, bytes_per_s)
    found = fitted_link(timed(link))
    for size in SIZES:
        assert found.seconds(size) == pytest.approx(link.seconds(size), rel=1e-5)
    if latency_s > 1e-3 * SIZES[0] / bytes_per_s:
        assert found.latency_s == pytest.approx(latency_s, rel=1e-3)
    if SIZES[-1] / bytes_per_s > 1e-3 * latency_s:
        assert found.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-3)


def test_noise_of_single_exchanges_is_left_out_and_that_of_all_is_averaged() -> None:
    """Each exchange is up to 10 % slower or faster, and of five one is ten times slower."""
    rng = np.random.default_rng(0)
    link = Link(2e-4, 1e9)
    for _ in range(100):
        noise = rng.uniform(0.9, 1.1, (len(SIZES), 5))
        noise[:, rng.integers(5)] *= 10
        found = fitted_link(timed(link, noise.tolist()))
        assert found.latency_s == pytest.approx(link.latency_s, rel=0.2)
        assert found.bytes_per_s == pytest.approx(link.bytes_per_s, rel=0.2)


@given(
    st.lists(
        st.lists(st.floats(1e-7, 10.0), min_size=1, max_size=5),
        min_size=2,
        max_size=len(SIZES),
    )
)
def test_whatever_times_say_a_link_is_one(seconds: list[list[float]]) -> None:
    found = fitted_link([Timed(*one) for one in zip(SIZES, seconds, strict=False)])
    assert found.latency_s >= 0
    assert 0 < found.bytes_per_s < float("inf")


def test_times_that_do_not_grow_leave_the_rate_of_the_largest_exchange() -> None:
    found = fitted_link([Timed(10, [0.5]), Timed(1000, [0.25])])
    assert found == Link(latency_s=0.25, bytes_per_s=4000.0)
    found = fitted_link([Timed(10, [0.001]), Timed(1000, [1.0])])
    assert found.latency_s == 0.0


def test_links_are_told_and_found_again() -> None:
    for links in (Links(inside=Link(1e-5, 1e10 / 3), between=None), Links(None, Link(0.0, 1e9))):
        assert Links.of(json.loads(json.dumps(links.told()))) == links
    assert Links(inside=None, between=Link(2e-6, 1e9)).fields() == {
        "between_gbit_per_s": pytest.approx(8.0),
        "between_latency_us": pytest.approx(2.0),
    }
