"""Experts that are copied for free, by hand and at the bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.plan.links import Link, Links
from moesys.plan.overlap import overlap_degree

SLOW, FAST = Link(0.001, 1e8), Link(0.001, 1e10)
MIB = 2**20


@pytest.mark.parametrize(
    ("links", "ahead_s", "degree"),
    [
        (Links(FAST, SLOW), 0.001 + 4.5 * MIB / 1e8, 4),
        (Links(None, SLOW), 0.001 + 4.5 * MIB / 1e8, 4),
        (Links(FAST, None), 0.001 + 4.5 * MIB / 1e10, 4),
        (Links(FAST, SLOW), 0.0005, 1),
        (Links(FAST, SLOW), 10.0, 64),
    ],
    ids=["the uplink decides", "one rank a node", "one node", "no time", "time for more than all"],
)
def test_degrees_by_hand(links: Links, ahead_s: float, degree: int) -> None:
    assert overlap_degree([ahead_s], links, MIB, 64) == degree


def test_a_slow_first_step_is_left_out() -> None:
    ahead_s = [60.0, *([0.001 + 2.5 * MIB / 1e8] * 4)]
    assert overlap_degree(ahead_s, Links(FAST, SLOW), MIB, 64) == 2


@given(st.integers(1, 64), st.floats(1e3, 1e9), st.floats(1e6, 1e11), st.floats(0, 1e-2))
def test_so_many_come_in_time_and_one_more_does_not(degree, copy_bytes, bytes_per_s, latency_s):
    link = Link(latency_s, bytes_per_s)
    ahead_s = [link.seconds((degree + 0.5) * copy_bytes)]
    assert overlap_degree(ahead_s, Links(None, link), copy_bytes, 64) == degree
