"""What the ranks told comes to: which nodes are named, which must go, and how it is shown."""

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.doctor import cluster_text, conclusion, text
from moesys.doctor.conclusion import Links, Placed
from moesys.doctor.finding import fail, ok, warn
from moesys.doctor.links import Rails
from moesys.doctor.node_names import hostlist
from moesys.doctor.outliers import ratings, slow_every_time, slow_ones, slow_pairs
from moesys.doctor.report import Measured, RankReport
from moesys.doctor.tournament import rounds, spread
from moesys.parallel.hostlist import expand_hosts
from tests.doctor.cluster_cases import LINK_TIMES, OWN

seconds = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40)


@given(st.integers(0, 60))
def test_a_tournament_has_every_pair_once_and_no_member_twice_in_a_round(members: int) -> None:
    every = rounds(members)
    pairs = [pair for played in every for pair in played]
    assert sorted(pairs) == list(itertools.combinations(range(members), 2))
    for played in every:
        busy = [member for pair in played for member in pair]
        assert len(busy) == len(set(busy))
    assert len(every) == (0 if members < 2 else members - 1 + members % 2)


@given(st.integers(2, 40), st.integers(1, 50))
def test_some_rounds_are_spread_over_all_and_leave_no_even_field_without(
    members: int, limit: int
) -> None:
    every = rounds(members)
    chosen = spread(every, limit)
    assert len(chosen) == min(limit, len(every))
    positions = [every.index(played) for played in chosen]
    gaps = [b - a for a, b in itertools.pairwise([*positions, len(every)])]
    assert min(gaps) > 0
    assert max(gaps) - min(gaps) <= 1
    if members % 2 == 0:
        assert all(len(played) == members // 2 for played in chosen)
    if limit >= len(every):
        assert chosen == every


@given(seconds, st.floats(1.01, 5), st.floats(1e-3, 1e3))
def test_slow_ones_are_a_minority_whatever_the_unit(
    values: list[float], factor: float, unit: float
) -> None:
    found = slow_ones(values, factor)
    assert len(found) <= len(values) / 2
    assert all(values[index] > factor * sorted(values)[(len(values) - 1) // 2] for index in found)
    rest = [values[i] for i in range(len(values)) if i not in found]
    assert all(values[index] > max(rest) for index in found)
    power_of_two = 2.0 ** math.floor(math.log2(unit))  # exact
    assert slow_ones([power_of_two * v for v in values], factor) == found


@given(seconds.filter(lambda values: len(values) > 2), st.floats(1.2, 5), st.data())
def test_one_slow_among_equals_is_found_and_no_other(
    values: list[float], factor: float, data: st.DataObject
) -> None:
    usual = values[0]
    slow = data.draw(st.integers(0, len(values) - 1))
    times = [usual] * len(values)
    assert slow_ones(times, factor) == []
    times[slow] = usual * factor * 1.01
    assert slow_ones(times, factor) == [slow]
    times[slow] = usual * factor * 0.99
    assert slow_ones(times, factor) == []


def test_scatter_forgives_what_lies_within_it() -> None:
    assert slow_ones([1.0, 1.0, 1.01, 1.02, 1.5], 1.3) == [4]
    assert slow_ones([1.0, 1.1, 1.2, 1.3, 1.5, 0.9, 0.8], 1.3) == []


def test_slow_once_is_chance_and_slow_every_time_is_not() -> None:
    assert slow_every_time([[1, 1, 5], [1, 1, 5]], 1.3) == [2]
    assert slow_every_time([[1, 1, 5], [1, 5, 1]], 1.3) == []
    assert slow_every_time([[1, 2], [1, 2]], 1.3) == [1]  # of two, the slower
    assert slow_every_time([], 1.3) == []
    assert slow_ones([], 1.3) == []


@given(st.integers(3, 12), st.data())
def test_a_nodes_rate_is_told_from_its_partners(members: int, data: st.DataObject) -> None:
    """Links run at the rate of their slower end: the rates of all but the fastest node come out exactly."""
    own = data.draw(st.lists(st.floats(1, 100), min_size=members, max_size=members))
    pairs = {(i, j): min(own[i], own[j]) for i, j in itertools.combinations(range(members), 2)}
    found = ratings(pairs, members)
    fastest = own.index(max(own))
    assert [r for i, r in enumerate(found) if i != fastest] == [
        r for i, r in enumerate(own) if i != fastest
    ]
    assert slow_pairs(pairs, 1.01) == []
    pair = data.draw(st.sampled_from(sorted(pairs)))
    if members > 3 and max(pair) - min(pair) == 1:
        cut = pairs | {pair: pairs[pair] / 1000}
        assert slow_pairs(cut, 2.0) == [pair]


names = st.builds(
    lambda stem, number, width: f"{stem}{str(number).zfill(width)}",
    st.sampled_from(["n", "gpu-a", "r1c", "node-"]),
    st.integers(0, 120),
    st.integers(1, 3),
)


@given(st.sets(names | st.sampled_from(["login", "n1x", "a-b"]), min_size=1, max_size=40))
def test_a_host_list_stands_for_exactly_its_names(some: set[str]) -> None:
    assert sorted(expand_hosts(hostlist(some))) == sorted(some)


@pytest.mark.parametrize(
    ("some", "short"),
    [
        (["n2", "n1", "n3", "n7"], "n[1-3,7]"),
        (["n9", "n10"], "n[9-10]"),
        (["gpu001", "gpu002"], "gpu[001-002]"),
        (["n1"], "n1"),
        (["login", "n1", "n1"], "login,n1"),
        ([], ""),
    ],
)
def test_host_lists_are_short(some: list[str], short: str) -> None:
    assert hostlist(some) == short


def test_rails_of_links_add_up_and_the_slower_end_counts() -> None:
    rates = conclusion.link_rates(LINK_TIMES, ["n1", "n2"])
    assert rates.gbit_per_s == {(0, 1): 8.0 / 2.0 + 8.0 / 4.0}
    assert rates.round_trip_us == {(0, 1): pytest.approx(40.0)}


def test_ranks_of_one_position_are_a_rail() -> None:
    rails = Rails.of(["a", "b", "a", "b", "b"])
    assert rails.nodes == ("a", "b")
    assert rails.ranks == ((0, 2), (1, 3))
    assert [rails.find(rank) for rank in range(5)] == [(0, 0), (1, 0), (0, 1), (1, 1), None]


def test_equal_findings_of_nodes_are_one() -> None:
    placed = conclusion.place_findings(OWN)
    assert [(p.finding.name, p.finding.detail, p.nodes) for p in placed] == [
        ("own checks", "1 are well", ("n1", "n2")),
        ("own checks", "2 are well", ("n3",)),
        ("clock", "wrong by 1 s (on n1)", ("n1", "n2")),
    ]


def test_nodes_go_that_fail_where_others_do_not() -> None:
    nodes = ["n1", "n2", "n3"]
    placed = [
        Placed(finding=fail("memory", "little", "buy"), nodes=("n2",)),
        Placed(finding=fail("disk", "full", "free"), nodes=("n1", "n2", "n3")),
        Placed(finding=fail("ranks", "few", "look")),
        Placed(finding=warn("clock", "wrong", "run"), nodes=("n3",)),
        Placed(finding=ok("links", "fast"), nodes=("n1",)),
    ]
    assert conclusion.to_exclude(placed, nodes) == ["n2"]
    # One finding each, of the same name: it is all of them again.
    each = [Placed(finding=fail("disk", f"full {n}", "free"), nodes=(n,)) for n in nodes]
    assert conclusion.to_exclude(each, nodes) == []
    assert conclusion.to_exclude(each[:2], nodes) == ["n1", "n2"]


def test_reports_travel_as_json() -> None:
    assert RankReport.from_json(OWN[0].to_json()) == OWN[0]
    assert Measured.from_json(LINK_TIMES[0].to_json()) == LINK_TIMES[0]


def test_the_exclude_file_grows_and_is_never_emptied(tmp_path: Path) -> None:
    path = tmp_path / "exclude"
    assert cluster_text.add_excluded(path, []) == ""
    assert not path.exists()
    cluster_text.add_excluded(path, ["n3", "n4"])
    cluster_text.add_excluded(path, ["n5", "n3"])
    cluster_text.add_excluded(path, [])
    assert path.read_text() == "n[3-5]\n"
    assert [file.name for file in tmp_path.iterdir()] == ["exclude"]
    path.write_text("#!/bin/bash\nrm [\n")
    with pytest.raises(ValueError, match=r"exclude holds something else .*: name another file"):
        cluster_text.add_excluded(path, ["n1"])


def test_a_heat_map_of_many_nodes_is_folded_and_keeps_the_slow_one() -> None:
    count = 200
    pairs = {
        (i, j): 1.0 if 77 in (i, j) else 100.0 for i, j in itertools.combinations(range(count), 2)
    }
    links = Links(
        nodes=[f"n{i}" for i in range(count)],
        gbit_per_s=pairs,
        round_trip_us=dict.fromkeys(pairs, 1.0),
    )
    title, *drawn = cluster_text.link_map(links)
    assert title.startswith("Gbit/s")
    assert len(drawn) == 50  # four nodes a row
    assert f" n76... |{'@' * 50}|" in drawn
    assert all("@" in line for line in drawn)
    assert len(cluster_text.link_table(links)) == 1 + cluster_text.MAX_ROWS
    assert cluster_text.link_table(links)[1].startswith("n77 ")


def test_what_was_not_measured_is_a_question_mark() -> None:
    assert text.heat_map(["a", "bb"], [[None, None], [None, None]]) == [" a |\\?|", "bb |?\\|"]
    assert text.heat_map(["a", "b"], [[None, 0.0], [4.0, None]]) == ["a |\\@|", "b | \\|"]
