"""`moesys doctor`: whether this machine, or each node of a cluster, can train, and what to do if it cannot."""

import argparse
import json
import time
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moesys.doctor.finding import Finding, Where


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine, or a cluster; exit 1 if it cannot train",
        description="Check packages, compilers, memory, limits, disk, network, GPUs, checkpoints and the "
        "exchange between two processes of this machine, in a few seconds. Each warning says what to do. "
        "With --cluster, started once per rank (srun, mpirun or torchrun): each node and each link too.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="the folder that runs are written to (default: here)",
    )
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="examine all nodes and links of a job; start it on every rank",
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller files and fewer links, before each job"
    )
    parser.add_argument(
        "--exclude-file",
        metavar="FILE",
        type=Path,
        help="with --cluster: add the nodes that must go, as one line for sbatch --exclude",
    )


def run(args: argparse.Namespace) -> int:
    from moesys.doctor.finding import Where

    if not args.run_dir.is_dir():
        raise ValueError(f"--run-dir {args.run_dir} is no folder: name one that is there")
    if args.exclude_file and not args.cluster:
        raise ValueError("--exclude-file names nodes of a cluster: add --cluster")
    where = Where(run_dir=args.run_dir.resolve(), quick=args.quick)
    return _cluster(args, where) if args.cluster else _local(args.json, where)


def _cluster(args: argparse.Namespace, where: "Where") -> int:
    start_s = time.monotonic()
    from moesys.doctor.cluster import QUICK, Limits, Outcome, examine
    from moesys.doctor.cluster_text import add_excluded, lines, to_json
    from moesys.doctor.text import summary

    def tell(outcome: Outcome) -> None:
        if args.json:
            print(json.dumps(to_json(outcome), indent=2), flush=True)
        else:
            findings = [one.finding for one in outcome.placed]
            print("\n".join(lines(outcome)))
            print(f"\n{len(outcome.nodes)} nodes, {summary(findings, time.monotonic() - start_s)}")
            if outcome.exclude:
                print(f"must go: {' '.join(outcome.exclude)}", flush=True)
        if args.exclude_file:
            add_excluded(args.exclude_file, outcome.exclude)

    return examine(where, QUICK if args.quick else Limits(), tell)


def _local(as_json: bool, where: "Where") -> int:
    from moesys.doctor.finding import worst
    from moesys.doctor.host_checks import HOST_CHECKS
    from moesys.doctor.runner import run_checks
    from moesys.doctor.text import line, summary

    start_s = time.monotonic()
    findings = []
    for finding in chain(run_checks(HOST_CHECKS, where), _with_torch(where)):
        findings.append(finding)
        if not as_json:
            print(line(finding), flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(f"\n{summary(findings, time.monotonic() - start_s)}")
    return 1 if worst(findings) == "fail" else 0


def _with_torch(where: "Where") -> "Iterator[Finding]":
    """Torch is imported when the first of these is asked for; without torch there are none."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        return
    from moesys.doctor.runner import run_checks
    from moesys.doctor.torch_checks import TORCH_CHECKS

    yield from run_checks(TORCH_CHECKS, where)
