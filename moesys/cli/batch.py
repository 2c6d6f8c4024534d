"""`moesys plan batch`: which ranks work on which sequences of a batch, by every policy, compared and drawn."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesys.cli.configuration import add_overrides

if TYPE_CHECKING:
    from moesys.cli.batch_case import BatchCase
    from moesys.plan.batch.plan import BatchPlan
    from moesys.report.batch_timeline import Panel

_H100_FLOPS, _H100_GBYTES, _HOP_US = 4.5e14, 40.0, 10.0


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "batch",
        help="plan a batch of sequences of any length over data ranks, by every policy, and draw it",
        description="Which ranks work on which sequences of a batch, how long they work and wait, by formulas of the model's "
        "FLOPs and of the bytes that go around rings. Nothing is run, and no training executes such a plan yet.",
        epilog="example: moesys plan batch --lengths heavy_tail --ranks 8 --capacity-tokens 8192 --batch-tokens 262144 "
        "--svg plans.svg model=qwen3_30b_a3b",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--lengths",
        metavar="WHAT",
        help="tokens of the sequences: 512,64,2048; a file of such numbers; or made up: equal, uniform, lognormal or "
        "heavy_tail (default: documents of the run's data folder, in its order)",
    )
    parser.add_argument(
        "--batch-tokens",
        metavar="N",
        type=int,
        help="of the batch: as many sequences as have so many (default: train.global_batch_tokens; of given lengths all)",
    )
    parser.add_argument(
        "--longest-tokens",
        metavar="N",
        type=int,
        help="longer sequences are cut; made-up lengths are up to it (default: not cut; made up, what 8 ranks have memory for)",
    )
    parser.add_argument(
        "--ranks",
        metavar="N",
        type=int,
        help="data ranks, dp * cp (default: the fewest that the layout has)",
    )
    parser.add_argument(
        "--pp",
        metavar="N",
        type=int,
        help="pipeline stages of each data rank (default: parallel.pp)",
    )
    parser.add_argument(
        "--capacity-tokens",
        metavar="N",
        type=int,
        help="for which a rank has memory in a micro-step (default: train.micro_batch_tokens / parallel.cp)",
    )
    parser.add_argument(
        "--policy", metavar="NAME,...", help="planners to compare (default: all that there are)"
    )
    parser.add_argument(
        "--flops-per-s",
        metavar="X",
        type=float,
        default=_H100_FLOPS,
        help=f"that a GPU achieves (default: {_H100_FLOPS:g}, of an H100 about 45 %%)",
    )
    parser.add_argument(
        "--gbytes-per-s",
        metavar="X",
        type=float,
        default=_H100_GBYTES,
        help=f"from a GPU to the next of its ring (default: {_H100_GBYTES:g}, of 400 Gbit/s 80 %%)",
    )
    parser.add_argument(
        "--hop-us",
        metavar="X",
        type=float,
        default=_HOP_US,
        help=f"beside the bytes, from a GPU to the next of its ring, in each layer (default: {_HOP_US:g})",
    )
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")
    parser.add_argument(
        "--save", metavar="FILE", type=Path, help="write the plan, of one policy, as JSON"
    )
    parser.add_argument("--load", metavar="FILE", type=Path, help="look at a plan that was saved")
    parser.add_argument(
        "--svg", metavar="FILE", type=Path, help="draw ranks over time, a panel for each policy"
    )
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="the same as a page, with the table"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    from moesys.cli.batch_case import read_case

    case = read_case(args)
    plans, refused = _plans(case)
    panels, rows = [], []
    for name, (plan, planned_s) in plans.items():
        panel, row = _judged(case, name, plan)
        panels.append(panel)
        rows.append({"policy": name, **row, "planned_s": planned_s})
    if args.save is not None:
        ((plan, _),) = plans.values()
        _write(args.save, json.dumps(plan.to_json()) + "\n")
    if args.svg is not None or args.html is not None:
        _draw(args, case, panels, rows, refused)
    if args.json:
        print(json.dumps({**case.facts(), "policies": rows, "refused": refused}, indent=2))
    else:
        print("\n".join([case.caption, "", *_table(rows)]))
        print("".join(f"{name}: {reason}\n" for name, reason in refused.items()), end="")
    return 0


def _plans(case: "BatchCase") -> "tuple[dict[str, tuple[BatchPlan, float | None]], dict[str, str]]":
    """By policy, with the seconds that planning took; and why others have none. ValueError where none has."""
    from moesys.plan.batch.policies import planned

    if case.saved is not None:
        return {"saved": (case.saved, None)}, {}
    plans, refused = {}, {}
    for policy in case.policies:
        begun_s = time.perf_counter()
        try:
            plan = planned(
                policy,
                case.lengths_S,
                case.num_ranks,
                case.capacity_tokens,
                case.costs,
                meets=case.meets,
                stages=case.stages,
            )
        except ValueError as error:
            refused[policy] = str(error)
        else:
            plans[policy] = plan, time.perf_counter() - begun_s
    if not plans:
        raise ValueError("\n".join(f"{policy}: {reason}" for policy, reason in refused.items()))
    return plans, refused


def _judged(case: "BatchCase", name: str, plan: "BatchPlan") -> "tuple[Panel, dict[str, Any]]":
    """To be drawn, and its figures."""
    from dataclasses import asdict

    from moesys.plan.batch.figures import figures
    from moesys.plan.batch.timeline import timeline
    from moesys.report.batch_columns import BESIDE, COLUMNS
    from moesys.report.batch_timeline import Panel, drawn_ranks

    stages = case.stages
    ranks = drawn_ranks(plan.num_ranks, stages)
    found = timeline(plan, case.costs, stages=stages, meets=case.meets, ranks=ranks)
    told = figures(
        plan,
        case.costs,
        found.step_s,
        stages=stages,
        block_token_bytes=case.block_token_bytes,
    )
    row = {**asdict(told), "activation_bytes": told.held_tokens * case.activation_token_bytes}
    beside = [(COLUMNS[key][1](row[key]), COLUMNS[key][0]) for key in BESIDE]
    return Panel(name=name, plan=plan, timeline=found, figures=beside), row


def _draw(
    args: argparse.Namespace,
    case: "BatchCase",
    panels: "list[Panel]",
    rows: list[dict[str, Any]],
    refused: dict[str, str],
) -> None:
    from moesys.report.batch_page import render
    from moesys.report.batch_timeline import batch_svg, standalone

    caption, number = case.caption, len({rank for rank, _ in panels[0].timeline.spans})
    if number < case.num_ranks:
        caption += f"; {number} ranks drawn"
    svg = batch_svg(panels, caption)
    if args.svg is not None:
        _write(args.svg, standalone(svg))
    if args.html is not None:
        _write(args.html, render(svg, rows, refused, case.caption))


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A row per policy."""
    from moesys.report.batch_columns import COLUMNS, cells

    lines = [["policy", *(head for head, _ in COLUMNS.values())]]
    lines += [[row["policy"], *cells(row)] for row in rows]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return [
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(told, others, strict=True))])
        for name, *told in lines
    ]


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
