"""How long a pipeline schedule takes and how long its ranks wait, by walking its table of actions. Pure.

A table says what each rank computes, in order. The walk starts an action when the rank is free and what the action needs
has arrived. Letters: p ranks, v stages per rank, n micro-batches; durations F (forward), B (backward) = I (gradient of the
input) + W (gradient of the weights), each of one stage and one micro-batch, in any unit of time.

Shapes: R pipelines that run one table together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from moesys.plan.placement import Amounts

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """One computation of a rank."""

    kind: Kind
    stage: int
    micro_batch: int
    sent_after: int = 0
    """How many more actions the rank runs before it sends the result to another rank: 1 in a pair F&B, else 0."""


Table = Sequence[Sequence[Action]]
"""Per pipeline rank, its actions in order."""


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Of one stage and one micro-batch."""

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0

    @property
    def backward(self) -> float:
        return self.input_gradient + self.weight_gradient

    def scaled(self, factor: float) -> "Durations":
        """Of a stage that costs `factor` as much."""
        return Durations(
            forward=factor * self.forward,
            input_gradient=factor * self.input_gradient,
            weight_gradient=factor * self.weight_gradient,
        )

    def of(self, kind: Kind) -> float:
        return {
            "F": self.forward,
            "B": self.backward,
            "I": self.input_gradient,
            "W": self.weight_gradient,
        }[kind]


class Span(NamedTuple):
    """When an action runs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A walked table. The bubble of a rank is the share of the whole time in which it computes nothing."""

    spans_of_rank: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        return max(spans[-1].end for spans in self.spans_of_rank)

    @property
    def busy_of_rank(self) -> tuple[float, ...]:
        return tuple(sum(s.end - s.start for s in spans) for spans in self.spans_of_rank)

    @property
    def bubble_of_rank(self) -> tuple[float, ...]:
        return tuple(1.0 - busy / self.makespan for busy in self.busy_of_rank)

    @property
    def bubble(self) -> float:
        """The mean over ranks."""
        return sum(self.bubble_of_rank) / len(self.bubble_of_rank)

    @property
    def bubble_time(self) -> float:
        """The time beyond the work of the busiest rank."""
        return self.makespan - max(self.busy_of_rank)


def walk(
    table: Table, durations: Durations | Mapping[int, Durations], *, hand_over: float = 0.0
) -> Timeline:
    """When each action runs. `durations` of every stage, or by stage; `hand_over` is the way from rank to rank.

    Raises:
        ValueError: ranks wait for each other for ever, or for what no rank computes.
    """

    def end_of(action: Action, start_R: Amounts) -> Amounts:
        here = durations if isinstance(durations, Durations) else durations[action.stage]
        return start_R + here.of(action.kind)

    spans = timed(table, end_of, 1, hand_over=hand_over)
    return Timeline(
        spans_of_rank=tuple(
            tuple(
                Span(action, float(start_R[0]), float(end_R[0])) for action, start_R, end_R in row
            )
            for row in spans
        )
    )


def timed(
    table: Table,
    end_of: Callable[[Action, Amounts], Amounts],
    num_pipelines: int,
    *,
    hand_over: float = 0.0,
) -> list[list[tuple[Action, Amounts, Amounts]]]:
    """When the actions of each rank start and end, fp64 [R], in pipelines that all run this table.

    Args:
        end_of: when an action ends that could start at these times. It is asked for each once, after all that the action needs,
            and may have pipelines wait for one another.

    Raises:
        ValueError: ranks wait for each other for ever, or for what no rank computes.
    """
    rank_of_stage = {a.stage: rank for rank, actions in enumerate(table) for a in actions}
    last_stage = max(rank_of_stage)
    ended: dict[_Result, Amounts] = {}
    sent: dict[_Result, Amounts] = {}
    spans: list[list[tuple[Action, Amounts, Amounts]]] = [[] for _ in table]

    def arrival(result: _Result, rank: int) -> Amounts | None:
        """When `rank` has it; None if that is not known yet."""
        if rank_of_stage[result[1]] == rank:
            return ended.get(result)
        return sent[result] + hand_over if result in sent else None

    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(table):
            done = spans[rank]
            while len(done) < len(actions):
                action = actions[len(done)]
                needs = _needs(action, last_stage)
                arrivals = [at_R for need in needs if (at_R := arrival(need, rank)) is not None]
                if len(arrivals) < len(needs):
                    break
                free_at_R = done[-1][2] if done else np.zeros(num_pipelines)
                start_R = np.maximum.reduce([free_at_R, *arrivals])
                end_R = end_of(action, start_R)
                done.append((action, start_R, end_R))
                ended[_result(action)] = end_R
                for back, (earlier, _, _) in enumerate(done[:-3:-1]):
                    if earlier.sent_after == back:
                        sent[_result(earlier)] = end_R
                progress = True
    stuck = {
        rank: actions[len(done)]
        for rank, (actions, done) in enumerate(zip(table, spans, strict=True))
        if len(done) < len(actions)
    }
    if stuck:
        raise ValueError(f"the schedule stands still before {stuck}")
    return spans


def one_f_one_b(p: int, n: int) -> list[list[Action]]:
    """The table of 1F1B (2104.04473, section 2.2): as many forwards as there are ranks behind, then a forward and a backward in
    turn. Torch runs the same order for n >= p."""
    table: list[list[Action]] = []
    for rank in range(p):
        ahead = min(n, p - 1 - rank)
        actions = [Action("F", rank, i) for i in range(ahead)]
        for i in range(n):
            actions += [Action("F", rank, i + ahead)] if i + ahead < n else []
            actions.append(Action("B", rank, i))
        table.append(actions)
    return table


_Result = tuple[str, int, int]
"""Of a computation: kind, stage, micro-batch. A whole backward's is that of its I, which others wait for."""


def _result(action: Action) -> _Result:
    return ("I" if action.kind == "B" else action.kind, action.stage, action.micro_batch)


def _needs(action: Action, last_stage: int) -> list[_Result]:
    """What must be there before it starts."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind == "F":
        return [("F", stage - 1, micro_batch)] if stage else []
    if action.kind == "W":
        return [("I", stage, micro_batch)]
    later = [("I", stage + 1, micro_batch)] if stage < last_stage else []
    return [("F", stage, micro_batch), *later]


# --- What the papers say: time of a step beyond the work of one rank


def one_f_one_b_bubble(p: int, d: Durations) -> float:
    """GPipe (1811.06965) and 1F1B (2104.04473, sec. 2.2): (p - 1)(F + B), a share (p - 1) / (n + p - 1) of the step."""
    return (p - 1) * (d.forward + d.backward)


def interleaved_bubble(p: int, v: int, n: int, d: Durations) -> float:
    """Interleaved 1F1B (2104.04473, sec. 2.2), for n a multiple of p: (p - 1)(F + B) of a stage, 1/v of the rank's.

    A share (p - 1) / (v n + p - 1). With n < p a rank waits in each of v - 1 turns for the p - n ranks that have no
    micro-batch; the paper excludes this and torch does not.
    """
    return (p - 1 + (v - 1) * max(0, p - n)) * (d.forward + d.backward)


def zero_bubble_bubble(p: int, d: Durations) -> float:
    """ZB-H1 (2401.10241, table 2), called ZB1P by others, for W <= F, I and n >= p: (p - 1)(F + I - W)."""
    return (p - 1) * (d.forward + d.input_gradient - d.weight_gradient)


def zbv_bubble(d: Durations) -> float:
    """ZB-V (2401.10241, sec. 6), for F = I = W and n >= 2 p - 1: none between a rank's first action and its last.

    Raises:
        ValueError: other durations, of which the paper says nothing in closed form.
    """
    if not d.forward == d.input_gradient == d.weight_gradient:
        raise ValueError(f"ZB-V has a closed form for F = I = W only, not for {d}")
    return 0.0


def dualpipev_bubble(p: int, d: Durations) -> float:
    """DualPipeV (github.com/deepseek-ai/DualPipe), 2 p stages: (p - 1)(F&B + B - 3 W), here with F&B = F + B.

    F&B is the time of a forward and a backward that run as one piece, so that both hand on at its end.
    """
    return (p - 1) * (d.forward + 2 * d.backward - 3 * d.weight_gradient)


def paper_bubble(schedule: str, p: int, v: int, n: int, d: Durations) -> float:
    """Of the schedule of this name."""
    match schedule:
        case "gpipe" | "1f1b":
            return one_f_one_b_bubble(p, d)
        case "interleaved":
            return interleaved_bubble(p, v, n, d)
        case "interleaved_zero_bubble":
            return zero_bubble_bubble(p, d)
        case "zbv":
            return zbv_bubble(d)
        case "dualpipev":
            return dualpipev_bubble(p, d)
        case _:
            raise ValueError(f"{schedule!r} is no pipeline schedule")
