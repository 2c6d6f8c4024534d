"""The order of nodes by what they measured: as Slurm's where that is right, and stable where nothing stands out."""

import json
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.parallel.measured import addresses_in
from moesys.parallel.nearness import FACTOR, Link, measured_addresses
from moesys.parallel.topology import order_by_topology

LEVEL_US = (5.0, 20.0, 80.0)
"""A round trip between nodes of one leaf switch, of one spine switch, across the core."""


def shared_switches(a: str, b: str) -> int:
    """Of two addresses `spine.leaf.node`."""
    pairs = zip(a.split(".")[:-1], b.split(".")[:-1], strict=True)
    same = [one == other for one, other in pairs]
    return same.index(False) if False in same else len(same)


def tree_links(addresses: list[str], noise) -> list[Link]:
    """What nodes of a fat tree would measure. `noise`: how many times longer a way takes, and thinner it is."""
    links = []
    for a, b in combinations(addresses, 2):
        round_trip_us = LEVEL_US[2 - shared_switches(a, b)] * noise()
        # A tree that is thinner further up: the message takes as many times longer as the round trip.
        nodes = (a.rpartition(".")[2], b.rpartition(".")[2])
        links.append(
            Link(nodes=nodes, gbit_per_s=1000 / round_trip_us, round_trip_us=round_trip_us)
        )
    return links


TREES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5)).map(
        lambda a: f"s{a[0]}.t{a[0]}{a[1]}.n{a[0]}{a[1]}{a[2]}"
    ),
    min_size=1,
    max_size=14,
    unique=True,
)


@given(TREES, st.integers(1, 3), st.data())
def test_a_measured_tree_is_ordered_as_slurm_would(addresses, ranks_per_node, data):
    factor = st.floats(1.0, 1.3)
    links = tree_links(addresses, lambda: data.draw(factor))
    links = data.draw(st.permutations(links))
    nodes = [address.rpartition(".")[2] for address in addresses]
    measured = measured_addresses(nodes, links)
    of_ranks = [n for n in range(len(nodes)) for _ in range(ranks_per_node)]
    of_ranks = data.draw(st.permutations(of_ranks))
    assert order_by_topology([measured[nodes[n]] for n in of_ranks]) == order_by_topology(
        [addresses[n] for n in of_ranks]
    )


@given(st.integers(2, 12), st.data())
def test_where_no_length_stands_out_the_order_stays(count, data):
    nodes = [f"n{i}" for i in range(count)]
    way = st.floats(10.0, 10.0 * FACTOR * 0.99)
    links = [
        Link(nodes=pair, gbit_per_s=100.0, round_trip_us=data.draw(way))
        for pair in combinations(nodes, 2)
    ]
    measured = measured_addresses(nodes, links)
    assert measured == {node: node for node in nodes}
    assert order_by_topology([measured[node] for node in nodes]) == tuple(range(count))


def test_a_slow_node_tears_no_others_apart():
    """n1's cable is bad: it is as far from its neighbours as the other switch is, and goes between the two."""
    near, far = {"n0", "n1", "n2"}, {"n3", "n4", "n5"}
    links = []
    for a, b in combinations(sorted(near | far), 2):
        is_near = ({a, b} <= near or {a, b} <= far) and "n1" not in (a, b)
        links.append(Link(nodes=(a, b), gbit_per_s=100.0, round_trip_us=10.0 if is_near else 400.0))
    measured = measured_addresses(sorted(near | far), links)
    started = ["n3", "n0", "n4", "n1", "n5", "n2"]
    new_ranks = order_by_topology([measured[node] for node in started])
    ordered = [node for _, node in sorted(zip(new_ranks, started, strict=True))]
    assert ordered == ["n3", "n4", "n5", "n0", "n2", "n1"]


def test_bandwidth_alone_tells_switches_apart():
    links = [
        Link(nodes=(a, b), gbit_per_s=100.0 if a[0] == b[0] else 10.0, round_trip_us=20.0)
        for a, b in combinations(["a0", "b0", "a1", "b1"], 2)
    ]
    measured = measured_addresses(["a0", "b0", "a1", "b1"], links)
    assert order_by_topology([measured[n] for n in ("a0", "b0", "a1", "b1")]) == (0, 2, 1, 3)


def test_links_that_were_not_measured_are_not_needed():
    """A few rounds of the doctor's tournament: a chain of near nodes in each switch, one way between them."""
    near = [("a0", "a1"), ("a1", "a2"), ("b0", "b1"), ("b1", "b2")]
    links = [Link(nodes=pair, gbit_per_s=100.0, round_trip_us=10.0) for pair in near]
    links.append(Link(nodes=("a2", "b0"), gbit_per_s=100.0, round_trip_us=900.0))
    nodes = ["a0", "b0", "a1", "b1", "a2", "b2"]
    measured = measured_addresses(nodes, links)
    assert order_by_topology([measured[n] for n in nodes]) == (0, 3, 1, 4, 2, 5)


# The file.


def written(path, links) -> dict[str, str]:
    path.write_text(json.dumps({"nodes": [], "links": links}))
    return {"MOESYS_LINKS": str(path)}


def said(a: str, b: str, **changes) -> dict:
    return {"nodes": [a, b], "gbit_per_s": 10.0, "round_trip_us": 50.0} | changes


def test_the_doctors_file_is_read(tmp_path):
    links = [
        *(said("a0", "a1"), said("b0", "b1")),
        said("a0", "b1", gbit_per_s=1.0),
    ]
    measured = addresses_in(written(tmp_path / "links.json", links))
    assert {node: address.count(".") for node, address in measured.items()} == dict.fromkeys(
        ("a0", "a1", "b0", "b1"), 1
    )
    assert measured["a0"].split(".")[0] == measured["a1"].split(".")[0]
    assert measured["a0"].split(".")[0] != measured["b0"].split(".")[0]


def test_nobody_asks():
    assert addresses_in({}) == addresses_in({"MOESYS_LINKS": ""}) == {}


@pytest.mark.parametrize(
    ("links", "reason"),
    [
        ([{"nodes": ["a", "b"]}], "no key 'gbit_per_s'"),
        ([said("a", "b", gbit_per_s=0)], "a to b: 0 Gbit/s"),
        ([said("a", "b", round_trip_us=-1)], "a round trip of -1 us"),
        ([said("a", "b", round_trip_us="fast")], "could not convert string to float: 'fast'"),
        ([said("a", "b", nodes=["a"])], "not enough values"),
        (3, "not iterable"),
    ],
)
def test_another_file_is_refused(tmp_path, links, reason):
    environ = written(tmp_path / "links.json", links)
    with pytest.raises(ValueError, match=r"MOESYS_LINKS=.*links\.json is not what the doctor") as e:
        addresses_in(environ)
    assert reason in str(e.value)
    assert "moesys doctor --cluster --json > FILE" in str(e.value)


def test_an_empty_file_and_none(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is not what the doctor writes"):
        addresses_in({"MOESYS_LINKS": str(tmp_path / "empty")})
    with pytest.raises(ValueError, match=r"cannot be read \(No such file"):
        addresses_in({"MOESYS_LINKS": str(tmp_path / "none")})
