"""Routes of chunks: every copy comes from one who has it, crossing between nodes as seldom as can be."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.plan.chunk_routes import (
    ROUTE_KINDS,
    ChunkRoute,
    chunk_route,
    fastest_route,
    in_order_of_arrival,
)
from moesys.plan.links import Link, Links
from moesys.plan.placement import Placement, problems
from tests.plan.placements import random_placement, seeds

FAST, SLOW = 1e10, 1e8


def everywhere(ranks: int, experts: int = 1) -> Placement:
    """All experts of rank 0 on all ranks."""
    copies_PC = np.tile(np.arange(experts), (ranks, 1))
    copies_PC[0] = -1
    return Placement(owner_E=np.zeros(experts, dtype=np.int64), copies_PC=copies_PC)


@settings(deadline=None, max_examples=300)
@given(
    seeds(),
    st.integers(1, 10),
    st.integers(1, 9),
    st.integers(0, 4),
    st.integers(1, 4),
    st.sampled_from(ROUTE_KINDS),
)
def test_each_copy_comes_once_from_one_who_has_it(rng, experts, ranks, copies, per_node, kind):
    placement = random_placement(rng, experts, ranks, copies)
    route = chunk_route(placement, per_node, kind)
    has = {(int(owner), expert) for expert, owner in enumerate(placement.owner_E)}
    came = []
    for stage in route.stages:
        assert list(stage) == sorted(stage)
        assert all((hop.source, hop.expert) in has for hop in stage)
        came += [(hop.dest, hop.expert) for hop in stage]
        has |= {(hop.dest, hop.expert) for hop in stage}
    wanted = [(rank, e) for rank in range(ranks) for e in placement.copies(rank)]
    assert sorted(came) == sorted(wanted)
    arranged = in_order_of_arrival(placement, route)
    assert problems(arranged, copies) == []
    for rank in range(ranks):
        assert arranged.copies(rank) == [e for r, e in came if r == rank] == route.arrivals(rank)
        assert len(route.arrivals(rank)) == len(placement.copies(rank))
    assert sum(map(route.sent_chunks, range(ranks))) == len(wanted)
    if kind != "direct":
        nodes = range(-(-ranks // per_node))
        of_nodes = [
            {
                e
                for rank in range(n * per_node, min(ranks, (n + 1) * per_node))
                for e in placement.copies(rank)
            }
            - set(np.flatnonzero(placement.owner_E // per_node == n))
            for n in nodes
        ]
        assert [route.crossing_chunks(n)[1] for n in nodes] == [len(e) for e in of_nodes]


def test_the_three_ways_to_all_of_eight_ranks_on_four_nodes():
    crossing, stages = {}, {}
    for kind in ROUTE_KINDS:
        route = chunk_route(everywhere(8), 2, kind)
        stages[kind] = [len(stage) for stage in route.stages]
        crossing[kind] = [route.crossing_chunks(node) for node in range(4)]
    assert stages == {"direct": [7], "star": [3, 4], "relay": [1, 2, 4]}
    assert crossing["direct"] == [(6, 0), (0, 2), (0, 2), (0, 2)]
    assert crossing["star"] == [(3, 0), (0, 1), (0, 1), (0, 1)]
    assert [there for there, _ in crossing["relay"]] == [2, 1, 0, 0]


def test_gates_of_a_node_take_turns():
    route = chunk_route(everywhere(4, experts=4), 2, "star")
    assert [hop.dest for hop in route.stages[0]].count(2) == 2


@pytest.mark.parametrize(
    ("latency_s", "chunk_bytes", "fastest"),
    [(1.0, 1, "direct"), (0.0, 10**6, "relay"), (0.012, 10**6, "star")],
)
def test_the_links_decide(latency_s, chunk_bytes, fastest):
    links = Links(inside=Link(latency_s, FAST), between=Link(latency_s, SLOW))
    assert fastest_route(everywhere(8), 2, chunk_bytes, links).kind == fastest


def test_seconds_are_those_of_the_slowest_link_of_each_stage():
    links = Links(inside=Link(0.25, 100.0), between=Link(0.5, 10.0))
    route: ChunkRoute = chunk_route(everywhere(8), 2, "star")
    assert route.seconds(20, links) == pytest.approx(0.5 + 3 * 20 / 10 + 0.25 + 20 / 100)
    slower = [
        fastest_route(everywhere(8), 2, size, links).seconds(size, links) for size in (1, 10, 100)
    ]
    assert all(a < b for a, b in pairwise(slower))
