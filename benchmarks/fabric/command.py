"""The command line of the emulated cluster: up, run, stats, down."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from benchmarks.fabric.job import STORE_PORT, run_job
from benchmarks.fabric.layout import PRESETS, Layout, rate_bits, with_preset
from benchmarks.fabric.network import FabricError, down, fabric, layout_of, up
from benchmarks.fabric.traffic import uplinks

NAME = "moesys"
"""Of a fabric that is given none; one for a single command is named after this process."""
_EXAMPLES = """\
examples:
  sudo moesys-fabric up --nodes 4 --ranks-per-node 2 --inter 200mbit
  sudo moesys-fabric run -- python -m moesys.train experiment=quickstart parallel.ep=8
  sudo moesys-fabric stats
  sudo moesys-fabric down
  sudo moesys-fabric run --nodes 2 --preset pcie+25gbe -- hostname   # a fabric for this command alone
"""


def main(words: Sequence[str] | None = None) -> int:
    """Return the exit status; what cannot be done is said in one line on stderr, with status 2."""
    args = _parser().parse_args(words)
    try:
        return args.act(args)
    except (FabricError, ValueError) as error:
        print(f"moesys-fabric: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moesys-fabric",
        description="A cluster on one machine: a network namespace per rank, a bridge per node, shaped uplinks. Needs root.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser("up", help="make it; one of the same name is removed first")
    _add_layout(make, required=True)
    make.set_defaults(act=_up)
    runs = commands.add_parser("run", help="run a command as every rank, with torchrun's variables")
    _add_layout(runs, required=False)
    runs.add_argument("--timeout-s", type=float, help="end it after so long, with status 124")
    runs.add_argument("command", nargs="+", metavar="-- COMMAND")
    runs.set_defaults(act=_run)
    stats = commands.add_parser("stats", help="bytes that crossed each uplink since it was made")
    _add_name(stats)
    stats.add_argument("--json", action="store_true", help="as one line of JSON")
    stats.set_defaults(act=_stats)
    ends = commands.add_parser("down", help="remove it and end all that runs in it")
    _add_name(ends)
    ends.set_defaults(act=_down)
    guard = commands.add_parser("guard", help="remove it when standard input ends")
    _add_name(guard)
    guard.set_defaults(act=_guard)
    return parser


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="of the fabric; several may stand side by side")


def _add_layout(parser: argparse.ArgumentParser, required: bool) -> None:
    _add_name(parser)
    parser.add_argument("--nodes", type=int, required=required)
    parser.add_argument("--ranks-per-node", type=int, default=1, help="default 1")
    parser.add_argument(
        "--inter", metavar="RATE", help="of each uplink, each way: 200mbit; default unshaped"
    )
    parser.add_argument(
        "--intra", metavar="RATE", help="of each rank's interface; default unshaped"
    )
    parser.add_argument("--delay-us", type=int, help="one way between nodes; default 0")
    parser.add_argument("--mtu", type=int, default=9000, help="default 9000")
    parser.add_argument(
        "--cores-per-rank",
        type=float,
        metavar="CORES",
        help="what each rank computes with, as 0.2; default: all share the machine's cores as they need them",
    )
    presets = "; ".join(f"{name}: {preset.meaning}" for name, preset in PRESETS.items())
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help=f"uplinks and delay by the ratio of a kind of cluster, to --intra (default 4gbit). {presets}",
    )


def _layout(args: argparse.Namespace, name: str) -> Layout:
    inter = None if args.inter is None else rate_bits(args.inter)
    intra = None if args.intra is None else rate_bits(args.intra)
    delay_us = args.delay_us
    if args.preset is not None:
        if inter is not None:
            raise ValueError(
                f"--inter {args.inter} and --preset {args.preset} both set the uplinks: give one"
            )
        intra = intra or rate_bits("4gbit")
        inter, preset_delay_us = with_preset(PRESETS[args.preset], intra, args.ranks_per_node)
        delay_us = preset_delay_us if delay_us is None else delay_us
    return Layout(
        name=args.name or name,
        num_nodes=args.nodes,
        ranks_per_node=args.ranks_per_node,
        inter_bits=inter,
        intra_bits=intra,
        delay_us=delay_us or 0,
        mtu=args.mtu,
        cores_per_rank=args.cores_per_rank,
    )


def _up(args: argparse.Namespace) -> int:
    layout = _layout(args, NAME)
    up(layout)
    rate = "unshaped" if layout.inter_bits is None else f"{layout.inter_bits / 1e6:g} Mbit/s"
    delay = f", {layout.delay_us} us one way" if layout.delay_us else ""
    cores = "" if layout.cores_per_rank is None else f", {layout.cores_per_rank:g} cores each"
    print(f"{layout.num_nodes} nodes x {layout.ranks_per_node} ranks{cores}, uplinks {rate}{delay}")
    return 0


def _run(args: argparse.Namespace) -> int:
    if args.nodes is None:
        return run_job(layout_of(args.name or NAME), args.command, timeout_s=args.timeout_s)
    with fabric(_layout(args, f"run{os.getpid()}")) as layout:
        return run_job(layout, args.command, timeout_s=args.timeout_s)


def _stats(args: argparse.Namespace) -> int:
    links = uplinks(layout_of(args.name or NAME), but_ports=[STORE_PORT])
    if args.json:
        print(json.dumps([dataclasses.asdict(link) for link in links]))
        return 0
    print(
        f"{'uplink':8}{'sent bytes':>16}{'received':>16}{'TCP payload sent':>18}{'packets':>10}{'dropped':>9}"
    )
    for link in links:
        print(
            f"node{link.node:<4}{link.sent_bytes:16,}{link.received_bytes:16,}{link.payload_bytes:18,}"
            f"{link.sent_packets:10,}{link.dropped_packets:9,}"
        )
    print(f"payload: without the job's store (port {STORE_PORT})")
    return 0


def _down(args: argparse.Namespace) -> int:
    print(f"{down(args.name or NAME)} namespaces removed")
    return 0


def _guard(args: argparse.Namespace) -> int:
    sys.stdin.buffer.read()
    down(args.name or NAME)
    return 0
