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


def run(args: argparse.Namespace) -> int:
    from moesys.doctor.finding import Where

    if not args.run_dir.is_dir():
        raise ValueError(f"--run-dir {args.run_dir} is no folder: name one that is there")
    return _local(args.json, Where(run_dir=args.run_dir.resolve()))


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
