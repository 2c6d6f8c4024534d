"""What each rank says of itself before ranks work together, and what rank 0 concludes from it. Pure."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from moesys.parallel.topology import order_by_topology

CLOCK_SKEW_S = 2.0
"""Clocks that differ more make a rank look silent, or awake, to the watch of another."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One rank's answer."""

    rank: int
    node: str
    python: str
    torch: str
    moesys: str
    device: str
    """cpu, or the name of the GPU."""
    address: str | None
    """This machine's address on the way to the store."""
    interface: str | None
    """The one that holds the address, or that the user set."""
    topology: str | None
    problem: str = ""
    """Why this rank cannot take part, by itself or beside rank 0; "" if it can."""
    clock_ahead_s: float = 0.0
    """Of rank 0's."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all ranks go by."""

    problems: list[str]
    warnings: list[str]
    nodes: list[str]
    """The node of each new rank; "" of one that did not come."""
    new_ranks: list[int]
    """Of each rank as it was started."""
    has_several_machines: bool
    is_measured: bool = False
    """Whether the new ranks follow from what nodes measured, not from what the launcher tells."""

    @property
    def is_reordered(self) -> bool:
        return self.new_ranks != sorted(self.new_ranks)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Who shall come."""

    world_size: int
    nodes: Sequence[str]
    """The node of each rank, where the launcher tells; else ()."""
    ranks_per_node: int | None
    within_s: float
    measured: Mapping[str, str] = field(default_factory=dict)
    """The address of each node as `nearness` finds it; {} where nobody asks for it."""


_ALIKE = {
    "python": "use one interpreter on all nodes",
    "torch": "install one version on all nodes, or use one shared environment",
    "moesys": "run one copy of the code on all nodes",
    "device": "use nodes with equal devices, or set train.device=cpu",
}


def judge(present: Mapping[int, Facts], expected: Expected, complaints: Sequence[str]) -> Verdict:
    """All that speaks against a start at once. `complaints`: of processes that are no rank of this job."""
    ranks = sorted(present)
    problems = [*complaints]
    if not complaints and len(present) < expected.world_size:
        problems.append(absence(present, expected))
    problems += [
        f"rank {rank} on {present[rank].node}: {present[rank].problem}"
        for rank in ranks
        if present[rank].problem
    ]
    problems += _differences(present)
    unmeasured = {f.node for f in present.values()} - expected.measured.keys()
    is_measured = bool(expected.measured) and not unmeasured
    topologies = [
        expected.measured[f.node] if is_measured else f.topology
        for f in (present[rank] for rank in ranks)
    ]
    is_known = len(present) == expected.world_size and all(topologies)
    new_ranks = list(range(expected.world_size))
    if is_known:
        new_ranks = list(order_by_topology([str(t) for t in topologies]))
    nodes = [""] * expected.world_size
    for rank in ranks:
        nodes[new_ranks[rank]] = present[rank].node
    return Verdict(
        problems=problems,
        warnings=[
            *_clocks(present),
            *(_not_measured(unmeasured) if expected.measured and unmeasured else ()),
        ],
        nodes=nodes,
        new_ranks=new_ranks,
        has_several_machines=len({f.address for f in present.values() if f.address}) > 1,
        is_measured=is_measured,
    )


def absence(present: Mapping[int, Facts], expected: Expected) -> str:
    """Which ranks did not come, and from where, as far as the launcher or their neighbours tell."""
    missing = [rank for rank in range(expected.world_size) if rank not in present]
    places: dict[str, list[int]] = defaultdict(list)
    for rank in missing:
        places[_whereabouts(rank, present, expected)].append(rank)
    said = "; ".join(f"{spell(ranks)} {place}".strip() for place, ranks in places.items())
    return (
        f"{len(missing)} of {expected.world_size} ranks did not come within "
        f"train.start_timeout_s={expected.within_s:g}: {said}. Read their output; if they need longer, "
        "raise train.start_timeout_s"
    )


def _whereabouts(rank: int, present: Mapping[int, Facts], expected: Expected) -> str:
    if rank < len(expected.nodes):
        return f"on {expected.nodes[rank]}"
    if expected.ranks_per_node is None:
        return ""
    node = rank // expected.ranks_per_node
    first = node * expected.ranks_per_node
    neighbours = (present.get(r) for r in range(first, first + expected.ranks_per_node))
    name = next((facts.node for facts in neighbours if facts is not None), None)
    return f"on {name}" if name else f"(all of node {node}, counted from 0)"


def _differences(present: Mapping[int, Facts]) -> Iterator[str]:
    answers = {rank: asdict(facts) for rank, facts in sorted(present.items())}
    for key, fix in _ALIKE.items():
        by_value: dict[str, list[int]] = defaultdict(list)
        for rank, answer in answers.items():
            by_value[answer[key]].append(rank)
        if len(by_value) > 1:
            said = ", ".join(
                f"{value} on {spell(ranks)} ({_some({present[r].node for r in ranks})})"
                for value, ranks in by_value.items()
            )
            yield f"{key} must be the same on all ranks, but is {said}: {fix}"


def _clocks(present: Mapping[int, Facts]) -> Iterator[str]:
    by_node: dict[str, float] = {}
    for facts in present.values():
        by_node.setdefault(facts.node, facts.clock_ahead_s)
    wrong = {node: s for node, s in by_node.items() if abs(s) > CLOCK_SKEW_S}
    if wrong:
        said = ", ".join(
            f"{node} is {abs(s):.1f} s {'ahead' if s > 0 else 'behind'}"
            for node, s in wrong.items()
        )
        yield (
            f"clocks differ from rank 0's by more than {CLOCK_SKEW_S:g} s: {said}; times in logs and "
            "heartbeats mislead: start NTP or chrony there"
        )


def _not_measured(nodes: set[str]) -> Iterator[str]:
    yield (
        f"MOESYS_LINKS says nothing of {_some(nodes)}: ranks are not put in order by it; measure these nodes "
        "too, with moesys doctor --cluster --json"
    )


def spell(ranks: Sequence[int], most: int = 6) -> str:
    """ "rank 3", "ranks 0-3, 8": of sorted ranks."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    listed = words if len(words) <= most else [*words[: most - 1], "...", words[-1]]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(listed)}"


def _some(names: set[str], most: int = 4) -> str:
    listed = sorted(names)
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")
