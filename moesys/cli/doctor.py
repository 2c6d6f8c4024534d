"""`moesys doctor`: whether this machine can train, each line with what to do if it cannot."""

import argparse
import json
import time
from dataclasses import asdict

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine; exit 1 if it cannot train",
        description="Check packages, compilers, memory, limits, disk, GPUs and the exchange between two "
        "processes of this machine, in a few seconds. Each warning says what to do.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(args: argparse.Namespace) -> int:
    from moesys.cli.machine import CHECKS, Finding

    findings: list[Finding] = []
    start = time.monotonic()
    for check in CHECKS:
        for finding in check():
            findings.append(finding)
            if not args.json:
                fix = f"\n            -> {finding.fix}" if finding.fix else ""
                print(f"{_MARKS[finding.level]}  {finding.name}: {finding.detail}{fix}", flush=True)
    failed = sum(finding.level == "fail" for finding in findings)
    warned = sum(finding.level == "warn" for finding in findings)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        seconds = time.monotonic() - start
        print(f"\n{len(findings)} checks, {warned} warnings, {failed} failures in {seconds:.1f} s")
    return 1 if failed else 0
