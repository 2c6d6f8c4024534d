"""Which layers make up which pipeline stage, and which rank runs which stage. Pure.

Shapes: S stages, L layers.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf
from typing import Literal, NamedTuple, get_args

from moesys.config.schema import ModelConfig, ParallelConfig
from moesys.plan.costs import after_layers_flops_per_token, layer_flops_per_token

ScheduleName = Literal[
    "gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev"
]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
V_SHAPED: frozenset[str] = frozenset({"zbv", "dualpipev"})
"""Schedules in which rank r runs stages r and S-1-r, so that the first rank also runs the last stage."""
LOOPED: frozenset[str] = frozenset({"interleaved", "interleaved_zero_bubble"})
"""Schedules in which rank r runs stages r, r + pp, r + 2 pp, ..."""

SPLITS_BACKWARD: frozenset[str] = frozenset({"interleaved_zero_bubble", "zbv", "dualpipev"})
"""Schedules that compute gradients of inputs and of weights apart, in torch a weight's from one place of a stage alone."""


def stages_per_rank(schedule: str, virtual_stages: int) -> int:
    """How many stages a rank runs: two in a V, `virtual_stages` in a loop, else one."""
    if schedule in V_SHAPED:
        return 2
    return virtual_stages if schedule in LOOPED else 1


def stages_of_rank(schedule: str, pp_rank: int, pp: int, virtual_stages: int) -> list[int]:
    """The stages that a rank runs, first to last."""
    if schedule in V_SHAPED:
        return [pp_rank, 2 * pp - 1 - pp_rank]
    return [pp_rank + pp * i for i in range(stages_per_rank(schedule, virtual_stages))]


def layers_of_stages(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> list[list[int]]:
    """The layers of each stage, by cost, the head's included; all in one without a pipeline.

    Those of multi-token prediction are the last stage's.
    """
    if parallel.pp == 1:
        return [[*range(model.total_layers)]]
    costs = [layer_flops_per_token(model, i, seq_len) for i in range(model.num_layers)]
    num_stages = parallel.pp * stages_per_rank(parallel.pp_schedule, parallel.pp_virtual_stages)
    ahead = [*range(model.num_layers, model.total_layers)]
    last_cost = after_layers_flops_per_token(model, seq_len)
    stages = split_layers(costs, num_stages, last_cost=last_cost)
    return [*stages[:-1], stages[-1] + ahead]


def layers_of_ranks(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> list[list[int]]:
    """The layers of each pipeline rank, of all its stages."""
    of_stages, pp = layers_of_stages(model, parallel, seq_len), parallel.pp
    return (
        [
            [
                layer
                for stage in stages_of_rank(
                    parallel.pp_schedule, rank, pp, parallel.pp_virtual_stages
                )
                for layer in of_stages[stage]
            ]
            for rank in range(pp)
        ]
        if pp > 1
        else of_stages
    )


def costs_of_stages(
    model: ModelConfig, layers: Sequence[Sequence[int]], seq_len: int
) -> list[float]:
    """Forward FLOPs per token of each stage that `layers_of_stages` made; the last one's with all that follows."""
    costs = [
        float(sum(layer_flops_per_token(model, i, seq_len) for i in stage if i < model.num_layers))
        for stage in layers
    ]
    return [*costs[:-1], costs[-1] + after_layers_flops_per_token(model, seq_len)]


def split_layers(
    layer_costs: Sequence[float],
    num_stages: int,
    *,
    first_cost: float = 0.0,
    last_cost: float = 0.0,
) -> list[list[int]]:
    """Cut layers into `num_stages` runs so that the costliest stage, which sets the pace, costs least.

    `first_cost` is the embedding's, `last_cost` the head's: they come on top of the first and the last stage. Among the
    best cuts, the one whose costs are most even (least sum of squares). Every stage has a layer. O(S L^2).

    Raises:
        ValueError: fewer layers than stages.
    """
    num_layers = len(layer_costs)
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot make {num_stages} pipeline stages")
    ends = [0.0, *accumulate(layer_costs)]

    def cost_of(stage: int, start: int, stop: int) -> float:
        extra = (first_cost if stage == 0 else 0.0) + (
            last_cost if stage == num_stages - 1 else 0.0
        )
        return ends[stop] - ends[start] + extra

    # Two searches: the best pace of a cut's first stages may rule out the evenest whole among those of the best pace.
    pace, _ = _least(num_layers, num_stages, cost_of, max)
    _, starts = _least(
        num_layers,
        num_stages,
        cost_of,
        lambda squares, cost: squares + cost**2 if cost <= pace else inf,
    )
    return [list(range(a, b)) for a, b in zip(starts, [*starts[1:], num_layers], strict=True)]


def _least(
    num_layers: int,
    num_stages: int,
    cost_of: Callable[[int, int, int], float],
    add: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The cut with the least total, where `add` takes a total and a stage's cost to the next total; its stages' starts."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # of the layers before the key
    for stage in range(num_stages):
        layers_left = num_stages - stage - 1
        best = {
            stop: min(
                (add(total, cost_of(stage, start, stop)), [*starts, start])
                for start, (total, starts) in best.items()
                if start < stop
            )
            for stop in range(stage + 1, num_layers - layers_left + 1)
        }
    return best[num_layers]


class ScheduleProblem(NamedTuple):
    """Why a schedule cannot run, and what can be changed so that this reason is gone."""

    key: str
    """Of parallel, or num_micro_batches: those of one data rank in a step."""
    given: int
    rule: str
    """What must hold."""
    works: tuple[int, ...]
    """Values of the key near the given one that keep the rule, ascending."""
    schedule: str
    """One that runs as everything else is; "" if none does."""

    @property
    def fix(self) -> str:
        """What to do: "use 4 or 8, or parallel.pp_schedule=1f1b"."""
        other = f"parallel.pp_schedule={self.schedule}" if self.schedule else ""
        return "use " + ", or ".join(filter(None, [" or ".join(map(str, self.works)), other]))


def schedule_problems(
    schedule: str, pp: int, virtual_stages: int, num_micro_batches: int, num_layers: int
) -> list[ScheduleProblem]:
    """What keeps torch's schedule from running, or leaves a stage without a layer; [] if nothing does."""
    simple = next((s for s in ("1f1b", "gpipe") if _fits(s, pp, 1, num_micro_batches)), "")
    simple = simple if pp <= num_layers else ""
    problems: list[ScheduleProblem] = []

    per_rank = stages_per_rank(schedule, virtual_stages)
    if pp * per_rank > num_layers:
        if schedule in LOOPED and pp <= num_layers:
            key, given, most = "parallel.pp_virtual_stages", virtual_stages, num_layers // pp
        else:
            key, given, most = "parallel.pp", pp, num_layers // per_rank
        rule = (
            f"makes {pp} * {per_rank} = {pp * per_rank} stages with parallel.pp_schedule={schedule}, "
            f"which must be at most model.num_layers={num_layers}"
        )
        works = (most,) if most else ()
        problems.append(ScheduleProblem(key, given, rule, works, simple))

    if not _fits(schedule, pp, virtual_stages, num_micro_batches):
        problems.append(
            ScheduleProblem(
                "num_micro_batches",
                num_micro_batches,
                _micro_batch_rule(schedule, pp, num_micro_batches),
                _near(num_micro_batches, pp, lambda n: _fits(schedule, pp, virtual_stages, n)),
                simple,
            )
        )
    return problems


def with_empty_micro_batches(schedule: str, pp: int, virtual_stages: int, number: int) -> int:
    """The least number of micro-batches, of which so many have tokens, that torch's schedule runs."""
    while not _fits(schedule, pp, virtual_stages, number):
        number += 1
    return number


def _fits(schedule: str, pp: int, virtual_stages: int, num_micro_batches: int) -> bool:
    """Whether torch's schedule takes so many micro-batches."""
    if schedule in LOOPED:
        return num_micro_batches % rounds_of(pp, num_micro_batches) == 0
    if schedule in ("1f1b", "dualpipev"):
        return num_micro_batches >= pp * stages_per_rank(schedule, virtual_stages)
    return True


def rounds_of(pp: int, num_micro_batches: int) -> int:
    """A rank runs as many micro-batches through one of its stages as a round has, then turns to its next stage."""
    return max(1, num_micro_batches // pp)


def _micro_batch_rule(schedule: str, pp: int, num_micro_batches: int) -> str:
    if schedule in LOOPED:
        rounds = rounds_of(pp, num_micro_batches)
        return (
            f"must be a multiple of its {rounds} rounds ({num_micro_batches} // parallel.pp={pp}) "
            f"with parallel.pp_schedule={schedule}"
        )
    stages = pp * stages_per_rank(schedule, 1)
    return f"must be at least the number of stages {stages} with parallel.pp_schedule={schedule}"


def _near(value: int, step: int, fits: Callable[[int], bool]) -> tuple[int, ...]:
    """The last below `value` that fits and the first above. A multiple of 2 `step` = 2 pp always fits."""
    below = next(filter(fits, range(value - 1, 0, -1)), None)
    above = next(filter(fits, range(value + 1, value + 2 * step + 1)))
    return (above,) if below is None else (below, above)
