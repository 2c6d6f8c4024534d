"""`moesys config`: look at, check and compare configurations without running them."""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from moesys.cli import memory, mesh, pipeline
from moesys.cli.configuration import (
    add_config_dir,
    add_overrides,
    import_from_working_folder,
)

if TYPE_CHECKING:
    from moesys.config.schema import RunConfig


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "config",
        help="show, check and compare configurations",
        description="Look at configurations without running them.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    show = actions.add_parser("show", help="print every key with its resolved value")
    show.add_argument("--json", action="store_true", help="print JSON instead of YAML")

    check = actions.add_parser(
        "check", help="check every rule, component and file; exit 2 and list what is wrong"
    )

    layout = actions.add_parser(
        "mesh", help="show which rank does what: the groups of every parallel axis, node by node"
    )
    layout.add_argument("--json", action="store_true", help="print the same facts as JSON")

    for action in (check, layout):
        action.add_argument(
            "--world-size", metavar="N", type=int, default=1, help="ranks of the run (default: 1)"
        )
        action.add_argument(
            "--ranks-per-node", metavar="R", type=int, help="ranks that share a node (default: all)"
        )

    pipeline.add_parser(actions)
    memory.add_parser(actions)

    diff = actions.add_parser(
        "diff", help="keys in which two configurations differ; exit 1 if there are any"
    )
    for side in ("a", "b"):
        diff.add_argument(
            side,
            metavar=side.upper(),
            help="a resolved config.yaml, a run folder, or overrides in quotes",
        )

    keys = actions.add_parser("keys", help="every key with its type, default and meaning")
    keys.add_argument("--json", action="store_true", help="print one JSON list")
    keys.add_argument(
        "part", metavar="PART", nargs="?", default="", help="only keys with this in them"
    )

    for action in (show, check, layout):
        add_overrides(action)
    add_config_dir(diff)


def run(args: argparse.Namespace) -> int:
    actions = {
        "show": _show,
        "check": _check,
        "mesh": mesh.run,
        "pipeline": pipeline.run,
        "memory": memory.run,
        "diff": _diff,
        "keys": _keys,
    }
    return actions[args.action](args)


def _show(args: argparse.Namespace) -> int:
    from moesys.config.compose import compose, to_dict, to_yaml

    config = compose(args.overrides, args.config_dir)
    if args.json:
        print(json.dumps(to_dict(config), indent=2))
    else:
        print(to_yaml(config), end="")
    return 0


def _check(args: argparse.Namespace) -> int:
    from moesys.config.compose import compose, config_hash
    from moesys.config.validate import check
    from moesys.moe.contract import check_run_config

    mesh.check_counts(args)
    import_from_working_folder()
    config = compose(args.overrides, args.config_dir)
    warnings = check(config, args.world_size, args.ranks_per_node)
    check_run_config(config)
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"ok on {args.world_size} ranks, sha256 {config_hash(config)}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from moesys.config.diff import differences

    different = differences(_load(args.a, args.config_dir), _load(args.b, args.config_dir))
    for line in different:
        print(line)
    return 1 if different else 0


def _keys(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from moesys.config.keys import list_keys

    keys = [info for info in list_keys() if args.part in info.key]
    if args.part and not keys:
        from moesys.config.errors import did_you_mean

        known = {part for info in list_keys() for part in [info.key, *info.key.split(".")]}
        raise ValueError(f"no key has {args.part!r} in it: {did_you_mean(args.part, known)}")
    if args.json:
        print(json.dumps([asdict(info) for info in keys], indent=2))
        return 0
    for info in keys:
        default = "required" if info.required else f"default {json.dumps(info.default)}"
        print(f"{info.key}: {info.type}; {default}")
        if info.doc:
            print(f"    {info.doc}")
    return 0


def _load(side: str, config_dir: Path | None) -> "RunConfig":
    from moesys.config.compose import compose, load_resolved

    path = Path(side)
    if side and path.is_dir():
        return load_resolved(path / "config.yaml")
    if path.suffix in (".yaml", ".yml"):
        return load_resolved(path)
    return compose(shlex.split(side), config_dir)
