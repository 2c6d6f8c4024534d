"""Facts for every branch of every judge of a cluster, and the level and the nodes that each must come to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from moesys.doctor import conclusion
from moesys.doctor.conclusion import Links, Placed
from moesys.doctor.finding import Level, ok, warn
from moesys.doctor.report import LinkTime, Measured, RankReport
from tests.doctor.local_cases import Case

NODES = ("n1", "n2", "n3", "n4")
PAIRS = [(i, j) for i in range(4) for j in range(i + 1, 4)]


@dataclass(frozen=True)
class ClusterCase(Case):
    nodes: tuple[str, ...] = ()
    """Of the worst finding."""


def case(level: Level, says: str, placed: Placed | Iterable[Placed], *nodes: str) -> ClusterCase:
    every = [placed] if isinstance(placed, Placed) else list(placed)
    worst = [one for one in every if one.finding.level == level]
    assert worst, every
    assert {node for one in worst for node in one.nodes} == set(nodes), worst
    return ClusterCase(level, says, [one.finding for one in every], nodes)


def report(rank: int, node: str = "", **facts: str) -> RankReport:
    return RankReport(rank=rank, node=node or NODES[rank], findings=(), facts=facts)


def reports(name: str, *values: str) -> list[RankReport]:
    return [report(rank, **{name: value}) for rank, value in enumerate(values)]


def measured(rank: int, **facts: object) -> Measured:
    return replace(Measured(rank=rank, node=NODES[rank]), **facts)  # type: ignore[arg-type]


def links(rates: Mapping[tuple[int, int], float], trips: Mapping[tuple[int, int], float]) -> Links:
    return Links(
        nodes=NODES,
        gbit_per_s=dict.fromkeys(PAIRS, 10.0) | rates,
        round_trip_us=dict.fromkeys(PAIRS, 50.0) | trips,
    )


def products(*tries: tuple[float, float, float, float]) -> list[Measured]:
    return [measured(rank, product_s=[seconds[rank] for seconds in tries]) for rank in range(4)]


CUT_OFF = {"error": "RuntimeError: [gloo/transport] Connection closed by peer", "is_cut_off": True}
SLOW_N2 = {(0, 1): 1.0, (1, 2): 1.0, (1, 3): 1.0}

CLUSTER_CASES = [
    case("ok", "all are there", conclusion.judge_missing([], (), 60.0)),
    case("fail", "1 did not come", conclusion.judge_missing([2], NODES, 60.0), "n3"),
    case("fail", "the first is rank 2", conclusion.judge_missing([2, 3], (), 60.0)),
    case("ok", "1 versions", conclusion.judge_facts(reports("torch", "2", "2", "2"))),
    case(
        "fail",
        "2 on n[1-2,4]; 1 on n3",
        conclusion.judge_facts(reports("torch", "2", "2", "1", "2")),
        "n3",
    ),
    case("fail", "1 on n[3-4]", conclusion.judge_facts(reports("torch", "2", "2", "1", "1"))),
    case(
        "warn",
        "absent on n1",
        conclusion.judge_facts([report(0), *reports("variable NCCL_DEBUG", "a", "a", "a")[1:]]),
        "n1",
    ),
    case("ok", "at most 4.0 ms", conclusion.judge_skew({"n2": 0.001, "n3": -0.004})),
    case("warn", "9.0 s behind", conclusion.judge_skew({"n2": 0.001, "n3": -9.0}), "n3"),
    case("fail", "99.0 s ahead", conclusion.judge_skew({"n2": 99.0}), "n2"),
    case("ok", "one folder on all", conclusion.judge_run_dir("runs", [], 4)),
    case("fail", "on 1 of 4 nodes", conclusion.judge_run_dir("runs", ["n2"], 4), "n2"),
    case("fail", "on 3 of 4 nodes", conclusion.judge_run_dir("runs", ["n2", "n3", "n4"], 4)),
    case(
        "ok",
        "one node",
        conclusion.judge_links(Links(nodes=["n1"], gbit_per_s={}, round_trip_us={})),
    ),
    case("ok", "6 pairs of nodes, 10 to 10 Gbit/s", conclusion.judge_links(links({}, {}))),
    case(
        "fail",
        "at best 1 Gbit/s to any other node; 10 is usual",
        conclusion.judge_links(links(SLOW_N2, {})),
        "n2",
    ),
    case(
        "warn",
        "n1 to n4: 2 Gbit/s",
        conclusion.judge_links(links({(0, 3): 2.0}, {})),
        *("n1", "n4"),
    ),
    case(
        "warn",
        "takes 900 us at best",
        conclusion.judge_links(links({}, dict.fromkeys(SLOW_N2, 900.0))),
        "n2",
    ),
    case(
        "ok",
        "none slow in 2 tries",
        conclusion.judge_products(products((1, 1, 1, 1), (1, 1, 2, 1))),
    ),
    case(
        "fail",
        "rank 2: 2000.00, 3000.00 ms in its tries; 1000.00, 1000.00 usual",
        conclusion.judge_products(products((1, 1, 2, 1), (1, 1, 3, 1))),
        "n3",
    ),
    case(
        "fail",
        "rank 1: ValueError",
        conclusion.judge_errors(
            [measured(0, **CUT_OFF), measured(1, error="ValueError: no GPU"), measured(2)], []
        ),
        "n2",
    ),
    case(
        "fail",
        "no answer from 1 ranks: 3",
        conclusion.judge_errors([measured(0, **CUT_OFF)], [(3, "n4")]),
        "n4",
    ),
    case(
        "fail",
        "Connection closed by peer, and 1 more",
        conclusion.judge_errors([measured(0, **CUT_OFF), measured(1, **CUT_OFF)], []),
    ),
]


OWN = [
    replace(report(0), findings=[ok("disk", "9 GiB"), warn("clock", "wrong by 1 s", "run it")]),
    replace(report(1), findings=[ok("disk", "8 GiB"), warn("clock", "wrong by 2 s", "run it")]),
    replace(report(2), findings=[ok("disk", "7 GiB"), ok("clock", "right")]),
    report(3, node="n3"),
]
LINK_TIMES = [
    # Two rails between n1 and n2; each end has its own idea of how long it took.
    measured(0, size_bytes=10**9, links=[LinkTime(node=1, exchange_s=1.0, round_trip_s=1e-5)]),
    measured(1, size_bytes=10**9, links=[LinkTime(node=0, exchange_s=2.0, round_trip_s=2e-5)]),
    measured(0, rail=1, links=[LinkTime(node=1, exchange_s=4.0, round_trip_s=4e-5)]),
    measured(1, rail=1, links=[LinkTime(node=0, exchange_s=1.0, round_trip_s=1e-5)]),
]
