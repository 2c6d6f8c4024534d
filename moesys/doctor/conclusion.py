"""What the findings and measurements of all ranks come to, and which nodes must go. Pure."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moesys.doctor.finding import Finding, fail, ok, warn
from moesys.doctor.node_names import hostlist
from moesys.doctor.outliers import ratings, slow_every_time, slow_ones, slow_pairs
from moesys.doctor.report import Measured, RankReport

LINK_FACTOR = 2.0
"""A node whose best link is slower than the median of the nodes' best by this must go."""
LATENCY_FACTOR = 5.0
PRODUCT_FACTOR = 1.3
"""A rank whose matrix product takes so much longer than the median, in every try, is a straggler."""
WARN_SKEW_S, FAIL_SKEW_S = 2.0, 60.0
MUST_AGREE = ("python", "torch", "moesys", "CUDA", "NCCL", "GPUs")
"""Facts in which ranks must be equal; in all others they should."""

Pairs = Mapping[tuple[int, int], float]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A finding, and the nodes that it is about; all of them if there are none."""

    finding: Finding
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Links:
    """What the pairs of nodes reached, i < j by position in `nodes`."""

    nodes: Sequence[str]
    gbit_per_s: Pairs
    """Each way, all rails together."""
    round_trip_us: Pairs
    """Of the slowest rail."""


def judge_missing(missing: Sequence[int], node_of_rank: Sequence[str], limit_s: float) -> Placed:
    """Ranks that never came; `node_of_rank`: of all ranks, where the launcher tells, else ()."""
    if not missing:
        return Placed(finding=ok("ranks", "all are there"))
    nodes = tuple(sorted({node_of_rank[rank] for rank in missing})) if node_of_rank else ()
    return Placed(
        finding=fail(
            "ranks",
            f"{len(missing)} did not come within {limit_s:g} s, the first is rank {missing[0]}",
            "read the output of those; sinfo, ping: a node may be down, or not reach rank 0's machine",
        ),
        nodes=nodes,
    )


def judge_facts(reports: Sequence[RankReport]) -> Iterator[Placed]:
    """Differences between ranks, each with the nodes that are not like most."""
    names = sorted({name for report in reports for name in report.facts})
    differs = False
    for name in names:
        ranks_of: dict[str, list[RankReport]] = defaultdict(list)
        for report in reports:
            ranks_of[report.facts.get(name, "absent")].append(report)
        if len(ranks_of) < 2:
            continue
        differs = True
        groups = sorted(ranks_of.items(), key=lambda group: (-len(group[1]), group[0]))
        detail = "; ".join(f"{value} on {hostlist(r.node for r in some)}" for value, some in groups)
        # Two halves: nothing says which is the wrong one.
        is_tie = len(groups[0][1]) == len(groups[1][1])
        odd = () if is_tie else tuple(sorted({r.node for _, some in groups[1:] for r in some}))
        if name in MUST_AGREE:
            fix = (
                f"make {name} the same on all nodes: one shared environment, one image, one driver"
            )
            yield Placed(finding=fail(f"same {name}", detail, fix), nodes=odd)
        else:
            fix = "training works; if it is slow or odd, look here first"
            yield Placed(finding=warn(f"same {name}", detail, fix), nodes=odd)
    if not differs:
        detail = f"{len(names)} versions, variables and parts"
        yield Placed(finding=ok("same everywhere", detail))


def judge_errors(
    measured: Sequence[Measured], silent: Sequence[tuple[int, str]]
) -> Iterator[Placed]:
    """`silent`: rank and node of those that did not say what they measured.

    Ranks that were cut off by another one are not the cause, if there is one with an error of its own, or silent.
    """
    failed = [one for one in measured if one.error]
    own = [one for one in failed if not one.is_cut_off]
    for one in own:
        detail = f"rank {one.rank}: {one.error}"
        fix = "exclude the node if it happens again; that rank's output and dmesg say more"
        yield Placed(finding=fail("measuring", detail, fix), nodes=(one.node,))
    if silent:
        ranks = ", ".join(str(rank) for rank, _ in silent[:8])
        fix = (
            "look at those processes (py-spy dump, dmesg): they died, hang, or the way to them does"
        )
        yield Placed(
            finding=fail("measuring", f"no answer from {len(silent)} ranks: {ranks}", fix),
            nodes=tuple(sorted({node for _, node in silent})),
        )
    if failed and not own and not silent:
        detail = f"rank {failed[0].rank}: {failed[0].error}, and {len(failed) - 1} more"
        fix = "ranks do not reach each other: compare interfaces and firewalls, set GLOO_SOCKET_IFNAME"
        yield Placed(finding=fail("measuring", detail, fix))


def link_rates(measured: Sequence[Measured], nodes: Sequence[str]) -> Links:
    """From both ends' seconds: the slower end counts; the rates of rails add up."""
    exchange: dict[tuple[int, int, int], float] = {}
    trip: dict[tuple[int, int], float] = {}
    size_bytes = max((one.size_bytes for one in measured), default=0)
    for one in measured:
        own = nodes.index(one.node)
        for link in one.links:
            i, j = min(own, link.node), max(own, link.node)
            rail = (i, j, one.rail)
            exchange[rail] = max(exchange.get(rail, 0.0), link.exchange_s)
            trip[i, j] = max(trip.get((i, j), 0.0), link.round_trip_s * 1e6)
    rates: dict[tuple[int, int], float] = defaultdict(float)
    for (i, j, _), seconds in exchange.items():
        rates[i, j] += size_bytes * 8 / 1e9 / max(seconds, 1e-9)
    return Links(nodes=nodes, gbit_per_s=dict(rates), round_trip_us=trip)


def judge_links(links: Links) -> Iterator[Placed]:
    nodes = links.nodes
    if not links.gbit_per_s:
        yield Placed(finding=ok("links", "one node: none"))
        return
    best = ratings(links.gbit_per_s, len(nodes))
    known = sorted(rate for rate in best if rate is not None)
    usual = known[len(known) // 2]
    slow = slow_ones([1 / rate if rate else float("inf") for rate in best], LINK_FACTOR)
    for index in slow:
        detail = f"at best {best[index] or 0.0:.3g} Gbit/s to any other node; {usual:.3g} is usual"
        fix = (
            "exclude the node; look at its cable, port counters (ethtool -S, ibstat), negotiated rate and "
            "GLOO_SOCKET_IFNAME or NCCL_IB_HCA"
        )
        yield Placed(finding=fail("links", detail, fix), nodes=(nodes[index],))
    for i, j in slow_pairs(links.gbit_per_s, LINK_FACTOR):
        detail = f"{nodes[i]} to {nodes[j]}: {links.gbit_per_s[i, j]:.3g} Gbit/s; both reach more elsewhere"
        fix = "look at the switches between the two; keep them apart, or in different data replicas"
        yield Placed(finding=warn("link", detail, fix), nodes=(nodes[i], nodes[j]))
    trips = ratings({pair: -us for pair, us in links.round_trip_us.items()}, len(nodes))
    for index in slow_ones([-(us or 0.0) for us in trips], LATENCY_FACTOR):
        detail = (
            f"a round trip takes {-(trips[index] or 0.0):.0f} us at best, far more than others'"
        )
        fix = "look for a busy core (top), power saving (cpupower) or interrupt settings of its adapter"
        yield Placed(finding=warn("latency", detail, fix), nodes=(nodes[index],))
    if not slow:
        detail = (
            f"{min(links.gbit_per_s.values()):.3g} to {max(links.gbit_per_s.values()):.3g} Gbit/s"
        )
        yield Placed(finding=ok("links", f"{len(links.gbit_per_s)} pairs of nodes, {detail}"))


def judge_products(measured: Sequence[Measured]) -> Iterator[Placed]:
    """Stragglers at the same matrix product at the same time."""
    tries = list(zip(*(one.product_s for one in measured), strict=True))
    slow = slow_every_time(tries, PRODUCT_FACTOR)
    for index in slow:
        one = measured[index]
        times = ", ".join(f"{s * 1e3:.2f}" for s in one.product_s)
        usual = ", ".join(
            f"{sorted(seconds)[(len(seconds) - 1) // 2] * 1e3:.2f}" for seconds in tries
        )
        fix = "exclude the node; look for other processes, clocks (nvidia-smi -q -d CLOCK), heat, core binding"
        yield Placed(
            finding=fail(
                "matrix product", f"rank {one.rank}: {times} ms in its tries; {usual} usual", fix
            ),
            nodes=(one.node,),
        )
    if tries and not slow:
        best = [min(one.product_s) * 1e3 for one in measured]
        yield Placed(
            finding=ok(
                "matrix product",
                f"{min(best):.2f} to {max(best):.2f} ms on {len(best)} ranks, none slow in {len(tries)} tries",
            )
        )


def judge_skew(ahead_s: Mapping[str, float]) -> Iterator[Placed]:
    """`ahead_s`: of each other node's clock beside rank 0's."""
    wrong = {node: s for node, s in ahead_s.items() if abs(s) > WARN_SKEW_S}
    for node, seconds in wrong.items():
        detail = f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} rank 0's"
        make = fail if abs(seconds) > FAIL_SKEW_S else warn
        fix = "run chronyd or another NTP client there: times in logs and beats mislead"
        yield Placed(finding=make("clock skew", detail, fix), nodes=(node,))
    if ahead_s and not wrong:
        most = max(abs(s) for s in ahead_s.values())
        yield Placed(finding=ok("clock skew", f"at most {most * 1e3:.1f} ms"))


def judge_run_dir(folder: str, blind: Sequence[str], num_nodes: int) -> Placed:
    """`blind`: nodes that do not read what rank 0 wrote. If half of them do not, the folder is the wrong one."""
    if not blind:
        return Placed(finding=ok("shared folder", f"{folder} is one folder on all nodes"))
    is_of_nodes = 2 * len(blind) < num_nodes
    return Placed(
        finding=fail(
            "shared folder",
            f"{folder} on {len(blind)} of {num_nodes} nodes is not what rank 0 sees",
            "set run.dir to a file system that all nodes mount; there, mount it, or see why it lags",
        ),
        nodes=tuple(blind) if is_of_nodes else (),
    )


def place_findings(reports: Iterable[RankReport]) -> list[Placed]:
    """The nodes' own findings, equal ones together. Of those that are well only the number is told."""
    nodes_of: dict[tuple[str, str, str], list[tuple[str, Finding]]] = defaultdict(list)
    well: Counter[str] = Counter()
    for report in reports:
        for finding in report.findings:
            if finding.level == "ok":
                well[report.node] += 1
            else:
                key = (finding.level, finding.name, finding.fix)
                nodes_of[key].append((report.node, finding))
    placed = [
        Placed(finding=ok("own checks", f"{count} are well"), nodes=tuple(sorted(some)))
        for count, some in sorted(_by_value(well).items())
    ]
    for found in nodes_of.values():
        nodes = tuple(sorted({node for node, _ in found}))
        first = found[0][1]
        if len({finding.detail for _, finding in found}) > 1:
            first = replace(first, detail=f"{first.detail} (on {found[0][0]})")
        placed.append(Placed(finding=first, nodes=nodes))
    return placed


def to_exclude(placed: Iterable[Placed], nodes: Sequence[str]) -> list[str]:
    """Nodes that fail where others do not. What fails on all of them is not the nodes' fault."""
    failing: dict[str, set[str]] = defaultdict(set)
    for one in placed:
        if one.finding.level == "fail":
            failing[one.finding.name].update(one.nodes)
    return sorted({node for some in failing.values() if len(some) < len(nodes) for node in some})


def _by_value(counts: Mapping[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for name, count in counts.items():
        found[count].append(name)
    return found
