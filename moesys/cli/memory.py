"""`moesys config memory`: what a rank of each pipeline stage holds, and whether that fits a GPU, before there is any."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from moesys.cli.configuration import add_overrides

if TYPE_CHECKING:
    from moesys.plan.memory import RankMemory


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "memory",
        help="show what a rank holds, term by term; exit 1 with what would help if it does not fit a GPU",
    )
    parser.add_argument(
        "--world-size", metavar="N", type=int, default=1, help="ranks of the run (default: 1)"
    )
    parser.add_argument(
        "--gpu-memory-gib", metavar="X", type=float, help="of one GPU (default: only show)"
    )
    parser.add_argument(
        "--expert-load",
        metavar="L",
        type=float,
        default=1.0,
        help="rows that the fullest rank's experts serve, over the even share (default: 1)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the same facts as JSON, in bytes"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    from moesys.config.compose import compose
    from moesys.config.copies import with_copies
    from moesys.config.memory import memory_problems, plan_memory
    from moesys.config.validate import validate
    from moesys.parallel.dims import parallel_dims

    for option, value in (
        ("--world-size", args.world_size),
        ("--gpu-memory-gib", args.gpu_memory_gib),
        ("--expert-load", args.expert_load),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{option} {value} must be above 0")
    config = compose(args.overrides, args.config_dir)
    validate(config, world_size=args.world_size)
    dims = parallel_dims(config.parallel, args.world_size)
    composed = config
    config = with_copies(composed, dims, args.gpu_memory_gib, args.expert_load)
    stages = plan_memory(config, dims, args.expert_load)
    problems = []
    if args.gpu_memory_gib is not None:
        problems = memory_problems(config, dims, args.gpu_memory_gib, args.expert_load)
    if args.json:
        facts = _facts(stages, [str(problem) for problem in problems])
        if config is not composed:
            facts["placement.copies"] = config.placement.copies
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_table(stages)))
        if config is not composed:
            print(f"\nplacement.copies={config.placement.copies}, as many as fit")
        if args.gpu_memory_gib is not None and not problems:
            print(f"\nfits the {args.gpu_memory_gib:g} GiB of a GPU")
        for problem in problems:
            print(f"moesys config: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _facts(stages: "list[RankMemory]", problems: list[str]) -> dict[str, Any]:
    return {
        "stages": [{**stage.terms, "total": stage.total, "host": stage.host} for stage in stages],
        "total": max(stage.total for stage in stages),
        "fits": not problems,
        "problems": problems,
    }


def _table(stages: "list[RankMemory]") -> list[str]:
    """A row per term, a column per pipeline rank; terms that are nowhere are left out."""
    rows = [["GiB of a rank", *(f"pp rank {pp_rank}" for pp_rank in range(len(stages)))]]
    for name in stages[0].terms:
        if any(stage.terms[name] for stage in stages):
            rows.append([name, *(_gib(stage.terms[name]) for stage in stages)])
    rows.append(["at the worst moment", *(_gib(stage.total) for stage in stages)])
    rows.append(["host memory", *(_gib(stage.host) for stage in stages)])
    if len(stages) == 1:
        rows[0][1] = ""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join(
            [name.ljust(first), *(c.rjust(w) for c, w in zip(cells, others, strict=True))]
        ).rstrip()
        for name, *cells in rows
    ]


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3f}"
