"""`moesys config pipeline`: the layers of each stage, the schedule drawn over time, and how long ranks wait in it."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from moesys.cli.configuration import add_overrides

if TYPE_CHECKING:
    from moesys.config.schema import RunConfig
    from moesys.plan.bubble import Timeline

_FORMULA_RANKS = (2, 4, 8)
_FORMULA_MICRO_BATCHES = (8, 16, 32)
_MOST_COLUMNS = 400


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "pipeline", help="show the layers of each pipeline stage, the schedule and its bubble"
    )
    parser.add_argument(
        "--world-size", metavar="N", type=int, help="ranks of the run (default: the fewest)"
    )
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")
    parser.add_argument(
        "--formulas",
        action="store_true",
        help="instead: every schedule's bubble, counted and by its paper's formula",
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    if args.formulas:
        print("\n".join(_formulas()))
        return 0
    facts, timeline = _facts(args)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print("\n\n".join("\n".join(lines) for lines in (_stages(facts), _picture(facts, timeline))))
    return 0


def _facts(args: argparse.Namespace) -> "tuple[dict[str, Any], Timeline]":
    from moesys.config.compose import compose
    from moesys.config.validate import validate
    from moesys.parallel.dims import parallel_dims
    from moesys.parallelize.schedules import action_table, with_torch_first_stage
    from moesys.plan.bubble import Durations, walk
    from moesys.plan.pipeline import costs_of_stages, layers_of_stages, stages_of_rank

    config = compose(args.overrides, args.config_dir)
    parallel, model, seq_len = config.parallel, config.model, config.data.seq_len
    world_size = args.world_size if args.world_size is not None else fewest_ranks(config)
    if world_size < 1:
        raise ValueError(f"--world-size {world_size} must be at least 1")
    validate(config, world_size=world_size)
    dims = parallel_dims(parallel, world_size)
    num_micro_batches = config.train.micro_steps(dims.dp)
    schedule, pp, virtual = parallel.pp_schedule, parallel.pp, parallel.pp_virtual_stages
    layers = layers_of_stages(model, parallel, seq_len)
    costs = costs_of_stages(model, layers, seq_len)
    mean = sum(costs) / len(costs)
    table = action_table(schedule, pp, virtual, num_micro_batches)
    equal = with_torch_first_stage(Durations(), table)
    durations = {stage: each.scaled(costs[stage] / mean) for stage, each in equal.items()}
    timeline, even = walk(table, durations), walk(table, equal)
    ranks = [
        {
            "rank": rank,
            "stages": (stages := stages_of_rank(schedule, rank, pp, virtual)),
            "layers": [layers[stage] for stage in stages],
            "cost_share": sum(costs[stage] for stage in stages) / sum(costs),
            "bubble": timeline.bubble_of_rank[rank],
        }
        for rank in range(pp)
    ]
    facts = {
        "schedule": schedule,
        "world_size": world_size,
        "num_micro_batches": num_micro_batches,
        "num_stages": len(layers),
        "ranks": ranks,
        "bubble": timeline.bubble,
        "bubble_of_even_stages": even.bubble,
        "step_forwards": timeline.makespan,
    }
    return facts, timeline


def fewest_ranks(config: "RunConfig") -> int:
    """The smallest world that `parallel` fits."""
    from moesys.parallel.dims import parallel_dims

    parallel = config.parallel
    most = parallel.pp * parallel.tp * parallel.ep * parallel.etp * (parallel.dp_shard or 1)
    most *= getattr(parallel, "cp", 1)
    for world_size in range(max(1, parallel.pp), most):
        try:
            parallel_dims(parallel, world_size)
        except ValueError:
            continue
        return world_size
    return max(1, most)


def _stages(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{facts['schedule']}: {facts['num_stages']} stages on {len(facts['ranks'])} ranks, "
        f"{facts['num_micro_batches']} micro-batches per step, {facts['world_size']} ranks in all",
        "",
        "rank  cost   idle   stage: layers",
    ]
    for rank in facts["ranks"]:
        stages = ", ".join(
            f"{stage}: {_run_of(layers)}"
            for stage, layers in zip(rank["stages"], rank["layers"], strict=True)
        )
        lines.append(
            f"{rank['rank']:4}  {rank['cost_share']:5.1%}  {rank['bubble']:5.1%}  {stages}"
        )
    return [
        *lines,
        "",
        f"predicted bubble: {facts['bubble']:.1%} of the step; with stages of equal cost "
        f"{facts['bubble_of_even_stages']:.1%}",
    ]


def _run_of(layers: list[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _picture(facts: dict[str, Any], timeline: "Timeline") -> list[str]:
    """A row per rank, a column per moment; an action's name where it starts, dots where the rank waits."""
    several = facts["num_stages"] > len(facts["ranks"])
    names: list[list[tuple[str, float, float]]] = []
    for rank, spans in zip(facts["ranks"], timeline.spans_of_rank, strict=True):
        letter = {stage: chr(ord("a") + i) for i, stage in enumerate(rank["stages"])}
        names.append(
            [
                (
                    f"{letter[s.action.stage] if several else ''}{s.action.kind}{s.action.micro_batch}",
                    s.start,
                    s.end,
                )
                for s in spans
                if s.end > s.start
            ]
        )
    # The shortest action is as wide as its name and a space.
    width = max((len(name) + 1) / (end - start) for row in names for name, start, end in row)
    most = _MOST_COLUMNS
    legend = "F forward, B backward (I of the input, W of the weights), with the micro-batch"
    lines = [f"{legend}; a, b, ...: the rank's first stage, its second" if several else legend]
    for rank, row in enumerate(names):
        cells, column = "", 0
        for name, start, end in row:
            first, last = round(start * width), round(end * width)
            cells += "." * (first - column) + name.ljust(last - first)
            column = last
        cells += "." * (round(timeline.makespan * width) - column)
        lines.append(f"{rank:4}  {cells[:most]}{' ...' if len(cells) > most else ''}")
    return lines


def _formulas() -> list[str]:
    """A Markdown table: counted bubble / formula, in forwards of one stage with F = I = W; counted share of the step."""
    from moesys.parallelize.schedules import action_table
    from moesys.plan.bubble import Durations, paper_bubble, walk
    from moesys.plan.pipeline import LOOPED, SCHEDULES, schedule_problems, stages_per_rank

    columns = [f"n = {n}" for n in _FORMULA_MICRO_BATCHES]
    lines = [f"| schedule | p | {' | '.join(columns)} |", "| --- | --- |" + " --- |" * len(columns)]
    for schedule in SCHEDULES:
        name = f"{schedule}, v = 2" if schedule in LOOPED else schedule
        for pp in _FORMULA_RANKS:
            cells: list[str] = []
            for n in _FORMULA_MICRO_BATCHES:
                if schedule_problems(schedule, pp, 2, n, pp * stages_per_rank(schedule, 2)):
                    cells.append("refused")
                    continue
                timeline = walk(action_table(schedule, pp, 2, n), Durations())
                formula = paper_bubble(schedule, pp, 2, n, Durations())
                cells.append(f"{timeline.bubble_time:g} / {formula:g}, {timeline.bubble:.1%}")
            lines.append(f"| {name} | {pp} | {' | '.join(cells)} |")
    return lines
