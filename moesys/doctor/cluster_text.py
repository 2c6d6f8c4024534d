"""The outcome of a cluster's examination as text, as JSON, and as a list of nodes to leave out."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moesys.doctor.cluster import Outcome
from moesys.doctor.conclusion import Links, Placed
from moesys.doctor.finding import Finding
from moesys.doctor.node_names import hostlist
from moesys.doctor.outliers import ratings
from moesys.doctor.text import heat_map, line, table
from moesys.parallel.hostlist import expand_hosts

MAX_ROWS = 32
"""Of the table of nodes; the slowest are shown."""


def lines(outcome: Outcome) -> list[str]:
    found = [line(_named(one)) for one in outcome.placed]
    if outcome.links.gbit_per_s:
        found += ["", *link_table(outcome.links), "", *link_map(outcome.links)]
    return found


def link_table(links: Links) -> list[str]:
    """Each node's best and worst link and quickest round trip; of many nodes the slowest."""
    count = len(links.nodes)
    best = ratings(links.gbit_per_s, count)
    worst = ratings({pair: -rate for pair, rate in links.gbit_per_s.items()}, count)
    trips = ratings({pair: -us for pair, us in links.round_trip_us.items()}, count)
    rows = [
        (high, (node, f"{high:.2f}", f"{-(low or 0.0):.2f}", f"{-(trip or 0.0):.0f}"))
        for node, high, low, trip in zip(links.nodes, best, worst, trips, strict=True)
        if high is not None
    ]
    if len(rows) > MAX_ROWS:
        rows = sorted(rows)[:MAX_ROWS]
    return table(
        ("node", "best Gbit/s", "worst Gbit/s", "round trip us"), [cells for _, cells in rows]
    )


def link_map(links: Links) -> list[str]:
    return [
        "Gbit/s between nodes: blank is the best, @ almost nothing, ? not measured",
        *heat_map(links.nodes, matrix(links)),
    ]


def matrix(links: Links) -> list[list[float | None]]:
    """Gbit/s [N, N], symmetric; None on the diagonal and of what was not measured."""
    members = range(len(links.nodes))
    return [[links.gbit_per_s.get((min(i, j), max(i, j))) for j in members] for i in members]


def to_json(outcome: Outcome) -> dict[str, Any]:
    pairs = sorted(outcome.links.gbit_per_s)
    return {
        "nodes": list(outcome.nodes),
        "exclude": list(outcome.exclude),
        "findings": [asdict(one.finding) | {"nodes": list(one.nodes)} for one in outcome.placed],
        "links": [
            {
                "nodes": [outcome.links.nodes[i], outcome.links.nodes[j]],
                "gbit_per_s": outcome.links.gbit_per_s[i, j],
                "round_trip_us": outcome.links.round_trip_us[i, j],
            }
            for i, j in pairs
        ],
    }


def add_excluded(path: Path, nodes: Sequence[str]) -> str:
    """Write the nodes that must go, with those that the file has already, as one line for sbatch --exclude.

    Returns the line. Without any node the file is left as it is, or absent.

    Raises:
        ValueError: what is there is no list of nodes.
    """
    try:
        known = path.read_text().strip()
    except FileNotFoundError:
        known = ""
    try:
        former = expand_hosts(known) if known else ()
    except ValueError as error:
        raise ValueError(
            f"--exclude-file {path} holds something else ({error}): name another file, or remove it"
        ) from error
    text = hostlist([*former, *nodes])
    if nodes:
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(f"{text}\n")
        os.replace(beside, path)
    return text


def _named(one: Placed) -> Finding:
    where = f"{hostlist(one.nodes)}: " if one.nodes else ""
    return replace(one.finding, name=f"{where}{one.finding.name}")
