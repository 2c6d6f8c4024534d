"""Who is slow: not for one step, not for waiting, and in a real run by rank and node."""

import socket
import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moesys.train.straggler import (
    WINDOW_GATHERS,
    StragglerWatch,
    ratios,
    slow_ranks,
    straggler_line,
)
from tests.train.launched import overrides, records, run

times = st.floats(1.0, 100.0)


@given(data=st.data(), num_ranks=st.integers(2, 9), limit=st.floats(1.1, 4.0))
def test_a_rank_is_slow_that_is_slow_in_every_gather(data, num_ranks, limit):
    gather = st.lists(times, min_size=num_ranks, max_size=num_ranks)
    compute_ms_GW = data.draw(st.lists(gather, min_size=1, max_size=4))
    slow = slow_ranks(compute_ms_GW, limit)
    for rank in range(num_ranks):
        own = [ms[rank] / sorted(ms)[(num_ranks - 1) // 2] for ms in compute_ms_GW]
        assert (rank in slow) == all(ratio >= limit for ratio in own)
        if rank in slow:
            assert slow[rank] == pytest.approx(statistics.median(own))
    # At least the faster half and the median itself are never slow.
    assert len(slow) <= num_ranks // 2


@given(ms=st.lists(times, min_size=2, max_size=9), scale=st.floats(0.01, 100.0))
def test_ratios_do_not_depend_on_the_unit_and_the_lower_half_is_not_above_one(ms, scale):
    assert ratios([scale * one for one in ms]) == pytest.approx(ratios(ms))
    assert sorted(ratios(ms))[(len(ms) - 1) // 2] == pytest.approx(1.0)


def test_nothing_computed_is_not_slow():
    assert ratios([0.0, 0.0, 5.0]) == [1.0, 1.0, 1.0]
    assert slow_ranks([], 1.5) == {}


def watch(every_steps: int = 2, ranks: int = 3, limit: float = 1.5) -> StragglerWatch:
    nodes = [f"node-{rank}" for rank in range(ranks)]
    return StragglerWatch(every_steps=every_steps, limit_ratio=limit, nodes=nodes)


def test_one_slow_gather_is_none_and_a_straggler_is_told_once_until_it_is_even():
    found = watch()
    even, slow, slower = [10.0, 11.0, 10.0], [10.0, 11.0, 30.0], [10.0, 10.0, 40.0]
    told = [
        found.found(2 * number, gather)
        for number, gather in enumerate(
            [slow, slow, even, slow, slower, slow, slow, even, slow, slow, slower, slow]
        )
    ]
    assert [len(records) for records in told] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]
    (record,) = told[5]
    assert record == {
        "kind": "straggler",
        "step": 10,
        "rank": 2,
        "node": "node-2",
        "ratio": pytest.approx(30 / 11),
        "window": 2 * WINDOW_GATHERS,
    }
    assert straggler_line(record) == (
        "straggler: rank 2 on node-2 computes 2.73 times as long as the median rank, for 6 steps"
    )
    assert found.found(30, []) == [], "steps without a gather say nothing"


@given(steps_ms=st.lists(times, min_size=3, max_size=9), spike_ms=st.floats(1e3, 1e6))
def test_one_slow_step_does_not_show(steps_ms, spike_ms):
    assume(len(steps_ms) % 2)
    one = watch(every_steps=100)
    for ms in steps_ms:
        one.add({"data": 0.5, "forward": ms, "backward": 2.0, "optimizer": 1e6}, exchange_ms=1.0)
    without = statistics.median(steps_ms) + 1.5
    assert one.due(99) is None
    assert one.due(100) == pytest.approx(without)
    assert one.due(200) is None, "each step counts once"
    for ms in [*steps_ms, spike_ms]:
        one.add({"forward": ms}, exchange_ms=0.0)
    assert one.due(300) <= max(steps_ms)


def test_waiting_is_not_computing():
    one = watch(every_steps=1)
    one.add({"forward": 500.0, "backward": 300.0}, exchange_ms=780.0)
    assert one.due(1) == pytest.approx(20.0)
    one.add({"forward": 5.0}, exchange_ms=6.0)  # two clocks
    assert one.due(2) == 0.0


@pytest.mark.parametrize(("every_steps", "ranks"), [(0, 4), (5, 1)])
def test_nothing_is_gathered_where_nothing_can_be_compared(every_steps, ranks):
    one = watch(every_steps, ranks)
    one.add({"forward": 5.0}, 0.0)
    assert one.due(5) is None


@pytest.mark.alone
def test_a_slow_rank_is_named_with_its_node(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW_RANK", "1")
    monkeypatch.setenv("SLOW_S", "0.1")
    given = ["train.steps=12", "metrics.straggler_every_steps=2", "metrics.straggler_ratio=3"]
    slow = "model.moe.router._target_=tests.train.slow_router.SlowRouter"
    output = run(2, overrides(tmp_path / "slow", tiny_data, slow, *given))
    (found,) = records(tmp_path / "slow", "straggler")
    assert (found["rank"], found["window"]) == (1, 6)
    # The first step warms up on both ranks, and may hide the difference in the first gather.
    assert found["step"] in (6, 8)
    assert found["node"] == socket.gethostname()
    assert found["ratio"] >= 3
    assert f"step  {found['step']}/12  {straggler_line(found)}" in output
    # The other rank waited as long for it, in the exchange.
    exchange_ms = [record["exchange_ms"] for record in records(tmp_path / "slow", "train")]
    assert min(exchange_ms) > 50

    run(2, overrides(tmp_path / "even", tiny_data, *given))
    assert records(tmp_path / "even", "straggler") == []
