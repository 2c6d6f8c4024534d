"""The sections "Measured" of pages of docs/, each from the result of one benchmark. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

BEGIN, END = "<!-- measured: written by `make docs` -->", "<!-- measured: end -->"

Row = Mapping[str, Any]

Sections = Mapping[str, tuple[str, str]]
"""By the first column of a table: its title, and what it says."""

RELIABILITY: Sections = {
    "fault": (
        "Faults",
        "Two ranks under torchrun with restarts in place, a checkpoint every 5 steps; rank, step and phase by chance. `found`: from "
        "the fault until a rank says so or ends; `back`: until the next new step is done; medians, and the worst. `exact`: every loss "
        "of the job is bitwise that of one without faults.",
    ),
    "saves": (
        "Save stall",
        "quickstart's model, saved every 10 steps while steps go on. `stall`: what steps waited for a save.",
    ),
    "ranks": (
        "Start-up",
        "From `moesys train` on the command line to the end of the first step, the start of median length; rank 0's parts sum to the "
        "total. More ranks than cores wait for one another.",
    ),
    "faults": (
        "Goodput",
        "A rank killed, failed, or killed with a damaged checkpoint, once in every 20 restart times.",
    ),
    "requeues": (
        "Requeues",
        "Stopped by the signal of the time limit and requeued, on a real Slurm; exact: every step until the next one is bitwise "
        "that of a job left alone.",
    ),
    "mutations": (
        "Refusals",
        "Wrong configurations and environments that the real command refuses before a process group, with key, rule and fix.",
    ),
    "left_out": ("Left out", "What this machine could not be asked."),
}
ROUTERS: Sections = {
    "router": (
        "Routers",
        "Means over seeds after 400 steps of 4096 tokens, two ranks, equal active FLOPs; `max_mean_load` over the last half of the steps, "
        "mean over layers; `step_ratio` to the first row's run with the same seed.\n\n![](routers_compared.svg)",
    ),
    "balance counted over": (
        "Balance counted over more and more",
        "One loss, its f_i counted over 1 to 32 sequences, in the same model and data.\n\n![](balance_compared.svg)",
    ),
    "oracle tests": ("Oracles", "Comparisons with transformers' and megatron-core's routers."),
}
COMPRESSION: Sections = {
    "codec, error bound": (
        "Loss over the rows that travel",
        "A model of 0.8 M parameters on two ranks, 240 steps of 4096 tokens, means over seeds. `slope`, `none` and `residual` say how a token's result is moved from its row's, "
        "the number is `error_bound`; rows and bytes are means over steps, `gap_pct` of the loss is to the run without compression and the same seed.\n\n![](compression_compared.svg)",
    ),
    "trained with": (
        "Steps to the same loss",
        "quickstart, evaluated every 20 steps. `same_loss` is what both it and the plain runs reach, `steps` and `plain_steps` after "
        "how many steps, between evaluations by a straight line.",
    ),
    "model": (
        "Steps on a slow network",
        "Eight ranks on an emulated cluster of four nodes, all on two cores, from trained weights. `exchange_pct`: of a plain step, what exchanges of rows were to take when uplinks were shaped; `reached_pct`: what they took. "
        "Speedups among the figures at the top are of the share that was wanted: of exchanges of rows as much is left as was measured, and of a step `1 - share` beside them. "
        "`rows stay`: no row travels, which compression beats only by the work that it saves; gradients cross with all. `codec_ms`: of a step, mean over ranks, in the codec's and the wire's operators, of which `codec_cost_pct` is the share of what would be saved without them.",
    ),
    "layer": (
        "Beside DeepSpeed's layer",
        "The middle MoE layer, forward and backward, on the same cluster, with the same weights and tokens; without shared experts, which DeepSpeed's has not.",
    ),
}

FSSDP: Sections = {
    "routing": (
        "Steps",
        "Eight ranks on an emulated cluster of four nodes, each rank with its share of the machine's two cores and each layer's loads played again from a trace. `exchange_pct`: of a plain step under uniform routing, "
        "what exchanges of rows were found to take when uplinks were shaped. `zipf`: the hottest experts are rank 0's, or shuffled, in each layer otherwise; `moving hotspot`: 29 % of the slots, at another expert every 5 steps; "
        "`recorded`: loads of eight steps of a quickstart run. `owner_over_mean`: rows of the busiest rank over the mean, had owners served all; `max_over_mean`: as they were served. Bytes between nodes are of a step; `wait_ms`, mean over "
        "ranks, what steps waited for copies. Steps of `balanced`, `hecate` and `eplb` have a twenty-fifth of what experts took to move to other owners.",
    ),
    "in memory": (
        "Memory",
        "The most bytes that lived on a rank in a step under `zipf 1.2`, counted as storages are made and freed: parameters, gradients, optimizer states, activations, copies. Mean over ranks, and the fullest one.",
    ),
    "loads": (
        "Predictors",
        "`distance`: half the sum of |predicted share - true share|. `max_over_mean`: rows of the busiest of 8 ranks after `balanced` has planned with the prediction; had it known the loads; without copies.",
    ),
    "cluster": (
        "Simulated on larger clusters",
        "Speedup of a layer, attention included, over plain expert parallelism, with the planner that training uses and a model of time in the place of machines (`benchmarks/fssdp/simulated.py` says what it leaves out). A group of "
        "expert parallelism has at most as many ranks as a layer has experts; larger jobs have several.\n\n![](placement_simulated.svg)",
    ),
    "planned layers": (
        "Planning",
        "All layers of a step, on one core, loads by Zipf's law in any order.",
    ),
}


def section(
    name: str,
    sections: Sections,
    record: Mapping[str, Any] | None,
    table: Callable[[Sequence[Row]], str],
    where: Callable[[Mapping[str, Any]], str],
    tables: Callable[[Sequence[Row]], Sequence[Sequence[Row]]],
    source: Callable[[Mapping[str, Any], Sequence[Row]], list[str]],
) -> str:
    """What stands between the marks: a table for each kind of row, and where all was measured."""
    if record is None:
        return f"Not measured yet: `moesys bench {name}`.\n"
    parts = [
        f"`{record['command']}`. {where(record['env'])}\n",
        table([{"figure": key, "value": value} for key, value in record["headline"].items()]),
    ]
    for rows in tables(record["rows"]):
        title, text = sections[next(iter(rows[0]))]
        parts += [f"### {title}\n", f"{text}\n", *source(record, rows), table(rows)]
    return "\n".join(parts)


def with_section(page: str, text: str) -> str:
    """The page with `text` between its marks.

    Raises:
        ValueError: the page has no such marks, in this order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must have the lines {BEGIN!r} and {END!r}: put them back")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"
