"""The doctor on all ranks of a job: each node looks at itself, then all measure together, and rank 0 judges.

Everything is told through the job's store, before and beside the process group: a rank that is missing, differs
or hangs is a finding about its node, not an exception on all others.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from moesys.doctor import gemm, links, together
from moesys.doctor.conclusion import (
    Links,
    Placed,
    judge_errors,
    judge_facts,
    judge_links,
    judge_missing,
    judge_products,
    judge_run_dir,
    judge_skew,
    link_rates,
    place_findings,
    to_exclude,
)
from moesys.doctor.facts import facts_here
from moesys.doctor.finding import Where, worst
from moesys.doctor.host_checks import NODE_CHECKS as HOST_CHECKS
from moesys.doctor.report import Measured, RankReport
from moesys.doctor.runner import run_checks
from moesys.doctor.torch_checks import NODE_CHECKS as TORCH_CHECKS
from moesys.doctor.tournament import rounds, spread
from moesys.parallel.bootstrap import Process, process_group
from moesys.parallel.job_store import open_store
from moesys.parallel.launcher import Place
from moesys.parallel.surroundings import place_here

_POLL_S = 0.02
_FAREWELL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long rank 0 waits for the others."""

    start_s: float = 120.0
    """To find the store."""
    reports_s: float = 120.0
    """For the nodes' own checks."""
    measure_s: float = 600.0
    """For a collective, and for all that is measured."""


QUICK = Limits(start_s=60.0, reports_s=60.0, measure_s=60.0)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What rank 0 knows at the end."""

    nodes: tuple[str, ...]
    """In the order of their ranks."""
    placed: Sequence[Placed]
    links: Links
    exclude: Sequence[str]
    """Nodes that must go."""

    @property
    def code(self) -> int:
        return 1 if worst(one.finding for one in self.placed) == "fail" else 0


def examine(
    where: Where, limits: Limits, tell: Callable[[Outcome], None], device: str = "auto"
) -> int:
    """Collective over all ranks that the launcher started: the exit code, the same on all.

    Rank 0 calls `tell` before any rank is let go: a launcher that sees one rank fail ends the others.

    Raises:
        ValueError: the launcher's variables are wrong, or the store is out of reach.
    """
    place = place_here(os.environ)
    base = open_store(place, limits.start_s) if place.world_size > 1 else dist.HashStore()
    base.set_timeout(timedelta(seconds=limits.reports_s + limits.measure_s + _FAREWELL_S))
    store = dist.PrefixStore(f"doctor {place.job}", base)
    report = RankReport(
        rank=place.rank,
        node=place.node,
        findings=list(run_checks([*HOST_CHECKS, *TORCH_CHECKS], where))
        if place.local_rank == 0
        else (),
        facts=facts_here(),
    )
    _tell(store, "report", place.rank, report.to_json())
    if place.rank == 0:
        code = 1
        try:
            outcome = _preside(store, place, where, limits, device)
            tell(outcome)
            code = outcome.code
        finally:
            # Whatever was raised here, the others do not wait for it.
            store.set("code", str(code))
            _wait_for(store, "read", place.world_size - 1, _FAREWELL_S)
        return code
    orders = json.loads(store.get("orders"))
    if orders["measure"]:
        _measure(store, place, where, limits, device, orders["port"])
    code = int(store.get("code"))
    store.add("read", 1)
    return code


def _preside(store: dist.Store, place: Place, where: Where, limits: Limits, device: str) -> Outcome:
    told = _collect(store, "report", place.world_size, limits.reports_s)
    reports = [RankReport.from_json(told[rank]) for rank in sorted(told)]
    missing = [rank for rank in range(place.world_size) if rank not in told]
    nodes = tuple(dict.fromkeys(report.node for report in reports))
    alike = list(judge_facts(reports))
    placed = [
        *place_findings(reports),
        judge_missing(missing, place.nodes, limits.reports_s),
        *alike,
    ]
    every_node = tuple(dict.fromkeys([*nodes, *place.nodes]))
    can_measure = not missing and worst(one.finding for one in alike) != "fail"
    port = _free_port()
    store.set("orders", json.dumps({"measure": can_measure, "port": port}))
    rates = Links(nodes=nodes, gbit_per_s={}, round_trip_us={})
    if can_measure:
        _measure(store, place, where, limits, device, port)
        answers = _collect(store, "measured", place.world_size, limits.measure_s)
        measured = [Measured.from_json(answers[rank]) for rank in sorted(answers)]
        silent = [(r.rank, r.node) for r in reports if r.rank not in answers]
        placed += judge_errors(measured, silent)
        done = [one for one in measured if not one.error]
        rates = link_rates(done, nodes)
        if not silent and len(done) == len(measured):
            placed += _judge_measured(done, rates, where)
    return Outcome(nodes=nodes, placed=placed, links=rates, exclude=to_exclude(placed, every_node))


def _judge_measured(measured: Sequence[Measured], rates: Links, where: Where) -> list[Placed]:
    ahead = {one.node: one.clock_ahead_s for one in measured if one.clock_ahead_s is not None}
    blind = [one.node for one in measured if not one.sees_run_dir]
    return [
        *judge_links(rates),
        *judge_products(measured),
        *judge_skew(ahead),
        judge_run_dir(str(where.run_dir), blind, len(rates.nodes)),
    ]


def _measure(
    store: dist.Store, place: Place, where: Where, limits: Limits, device: str, port: int
) -> None:
    """Measure with all others, and tell it."""
    # The group has a store of its own, since the one that is open has the job's port.
    own = place if place.agent_has_store else replace(place, store_port=port)
    try:
        with process_group(device, limits.measure_s, limits.start_s, place=own) as process:
            measured = _measure_together(store, process, where)
    except Exception as error:  # whatever it is, it is told to rank 0
        text = (str(error).splitlines() or [""])[0]
        told = f"{type(error).__name__}: {text}"
        measured = Measured(
            rank=place.rank, node=place.node, error=told, is_cut_off=_is_of_a_collective(error)
        )
    _tell(store, "measured", place.rank, measured.to_json())


def _measure_together(store: dist.Store, process: Process, where: Where) -> Measured:
    rails = links.Rails.of(process.nodes)
    found = rails.find(process.rank)
    is_first = found is not None and found[1] == 0
    firsts = [ranks[0] for ranks in rails.ranks if ranks[0] != 0]
    ahead_s, sees, token = None, True, None
    if process.rank == 0:
        together.serve_time(store, firsts)
        token = together.leave_token(store, where.run_dir)
        sees = token is not None
    elif is_first:
        ahead_s = together.ask_time(store, process.rank)
        sees = together.sees_token(store, where.run_dir)
    dist.barrier()
    if token is not None:
        token.unlink()
    sizes = links.sizes(process.device, where.quick)
    schedule = spread(rounds(len(rails.nodes)), sizes.max_rounds)
    return Measured(
        rank=process.rank,
        node=process.node,
        size_bytes=sizes.exchange_bytes,
        rail=found[1] if found else 0,
        links=links.time_links(process.rank, rails, schedule, sizes.exchange_bytes, process.device),
        product_s=gemm.time_products(process.device, where.quick),
        sees_run_dir=sees,
        clock_ahead_s=ahead_s,
    )


def _is_of_a_collective(error: Exception) -> bool:
    """Gloo raises RuntimeError with the line of its own source."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
    )


def _tell(store: dist.Store, key: str, rank: int, text: str) -> None:
    store.set(f"{key} {rank}", text)
    store.add(f"{key}s", 1)


def _collect(store: dist.Store, key: str, world_size: int, limit_s: float) -> dict[int, str]:
    """What ranks told within the time, by rank."""
    _wait_for(store, f"{key}s", world_size, limit_s)
    ranks = [rank for rank in range(world_size) if store.check([f"{key} {rank}"])]
    return {rank: store.get(f"{key} {rank}").decode() for rank in ranks}


def _wait_for(store: dist.Store, counter: str, count: int, limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while store.add(counter, 0) < count and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
