"""`moesys plan`: what planners would do, before there is anything that does it."""

import argparse

from moesys.cli import batch


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "plan",
        help="show which ranks would work on what, and what it costs",
        description="Plan by formulas, without ranks, GPUs or torch.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    batch.add_parser(actions)


def run(args: argparse.Namespace) -> int:
    return {"batch": batch.run}[args.action](args)
