"""How patient the lifeline is: the kernel's rule, played through for any cut."""

import socket

from hypothesis import given
from hypothesis import strategies as st

from moesys.parallel.lifeline import _keep_alive
from moesys.parallel.probing import (
    FOUND_S,
    SURVIVED_CUT_S,
    Probing,
    probing,
    silence_after_cut_s,
)


def lost_s(rule: Probing, cut_begins_s: float, cut_s: float) -> float | None:
    """When Linux's tcp_keepalive_timer ends an idle connection, seconds from the cut's begin; None = never.

    The clock starts with a packet at 0; questions before and after the cut are answered at once.
    """
    heard_s, asked, now_s = 0.0, 0, float(rule.idle_s)
    while now_s < cut_begins_s + cut_s + 3 * rule.found_s:
        if asked >= rule.count:
            return now_s - cut_begins_s
        if cut_begins_s <= now_s < cut_begins_s + cut_s:
            asked += 1
            now_s += rule.interval_s
        else:
            heard_s, asked = now_s, 0
            now_s = heard_s + rule.idle_s
    return None


rules = st.integers(4, 60).map(probing)


@given(rules, st.floats(0, 100), st.floats(0, 1))
def test_a_short_cut_is_survived_whenever_it_begins(rule, begins_s, part):
    assert lost_s(rule, begins_s, part * rule.survived_s) is None


@given(rules, st.floats(0, 100), st.floats(0, 1000))
def test_a_machine_that_stays_away_is_found_in_time(rule, begins_s, longer_s):
    found_s = lost_s(rule, begins_s, rule.found_s + 1 + longer_s)
    assert found_s is not None
    assert rule.survived_s <= found_s <= rule.found_s + 1e-6


@given(st.floats(0.01, 100), st.floats(0, 1))
def test_retransmissions_come_back_within_twice_the_cut(cut_s, part):
    """A packet sent somewhere in the cut, and sent again after twice the time each."""
    sent_s, wait_s = part * cut_s, 0.2
    while sent_s < cut_s:
        sent_s += wait_s
        wait_s *= 2
    assert sent_s <= silence_after_cut_s(cut_s) + 1e-6


def test_the_lifeline_outlasts_a_cut_of_five_seconds_and_what_tcp_makes_of_it():
    rule = probing(FOUND_S)
    assert rule.found_s == FOUND_S
    assert rule.survived_s > silence_after_cut_s(SURVIVED_CUT_S)
    # And ranks that then need 3 s of patience and three waits of 2 s for a store that is gone end within 30 s.
    assert FOUND_S + 3 + 3 * 2 < 30


def test_the_kernel_is_told():
    with socket.socket() as sock:
        _keep_alive(sock)
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        told = [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert told == [2, 1, FOUND_S - 2, FOUND_S * 1000]
