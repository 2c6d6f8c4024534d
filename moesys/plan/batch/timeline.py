"""When each rank works on which piece of a batch plan, waits for keys of a ring, or for other ranks. Pure.

With one stage it is what `cost` counts: a piece's backward follows its forward. With a pipeline a data rank is several ranks with
an equal share of the layers each, and its micro-steps go through them in the order of 1F1B (`bubble.one_f_one_b`). A forward takes a
third of the time, a backward two, with the pieces in reverse order. All pipelines run all micro-steps, of which those without
tokens take no time; so ranks that share a sequence meet in every stage and never wait for each other for ever.

Shapes: R data ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.plan import BatchPlan
from moesys.plan.batch.seconds import BatchSeconds, meeting
from moesys.plan.bubble import Action, one_f_one_b, timed
from moesys.plan.placement import Amounts

Phase = Literal["forward", "backward"]
SHARES: Mapping[Phase, float] = {"forward": 1 / 3, "backward": 2 / 3}
"""Of the time of a piece."""


class Span(NamedTuple):
    """A stretch of a rank's time."""

    rank: int
    """Data rank."""
    stage: int
    begin_s: float
    end_s: float
    kind: Literal["compute", "keys", "idle"]
    """keys = waits for those of its ring; idle = waits for other ranks, or has nothing left to do."""
    phase: Phase | None = None
    micro_step: int | None = None
    sequence: int | None = None
    """None also where it is what a micro-step costs beside its pieces."""


@dataclass(frozen=True, kw_only=True)
class BatchTimeline:
    """Of one step."""

    step_s: float
    """Until the last rank has done its last micro-step."""
    spans: Mapping[tuple[int, int], tuple[Span, ...]]
    """Of each data rank and stage that was asked for, one after the other from 0 to `step_s`."""


def timeline(
    plan: BatchPlan,
    costs: BatchCosts,
    *,
    stages: int = 1,
    meets: bool,
    ranks: Iterable[int] | None = None,
) -> BatchTimeline:
    """Of a plan whose pieces cost so much on a rank with all layers.

    Args:
        stages: of each data rank's pipeline.
        meets: data ranks do in every layer, for experts, so that all those at a stage begin and end a micro-step together.
        ranks: data ranks whose spans are kept; None = all.
    """
    rows = _Rows(plan, costs, stages, meets, range(plan.num_ranks) if ranks is None else ranks)
    number = len(plan.micro_steps)
    one_stage = [[Action("F", 0, index) for index in range(number)]]
    table = one_f_one_b(stages, number) if stages > 1 else one_stage
    done = timed(table, rows.end_of, plan.num_ranks) if number else []
    step_s = max((float(end_R.max()) for actions in done for *_, end_R in actions), default=0.0)
    return BatchTimeline(step_s=step_s, spans=rows.filled(step_s))


class _Rows:
    """Spans of each rank and stage as they are laid."""

    def __init__(
        self, plan: BatchPlan, costs: BatchCosts, stages: int, meets: bool, ranks: Iterable[int]
    ) -> None:
        self._plan, self._costs, self._stages, self._meets = plan, costs, stages, meets
        self._spans: dict[tuple[int, int], list[Span]] = {
            (rank, stage): [] for rank in sorted(set(ranks)) for stage in range(stages)
        }
        seconds = BatchSeconds(plan.lengths_S, plan.num_ranks, costs)
        self._seconds = [seconds.of_pieces(step) for step in plan.micro_steps]
        """Of each piece of each micro-step on each of its ranks: in all, and of these for keys."""

    def end_of(self, action: Action, start_R: Amounts) -> Amounts:
        """Lays the pieces of a micro-step at one stage, where data ranks are ready at these times."""
        phases: tuple[Phase, ...] = ("forward",) if action.kind == "F" else ("backward",)
        if self._stages == 1:
            phases = ("forward", "backward")
        order = 1 if action.kind == "F" else -1
        index, stage = action.micro_batch, action.stage
        step = self._plan.micro_steps[index]
        pieces = list(zip(step, self._seconds[index], strict=True))
        groups = [list(range(self._plan.num_ranks))] if self._meets else meeting(step)
        free = _levelled(start_R, groups).tolist()
        if beside_s := self._costs.micro_step_s:
            for rank in sorted({rank for piece in step for rank in piece.ranks}):
                free[rank] = self._lay(
                    (rank, stage), phases, free[rank], (index, None), beside_s, 0.0
                )
        for piece, (piece_s, keys_s) in pieces[::order]:
            for rank in piece.ranks:
                what = index, piece.sequence
                free[rank] = self._lay((rank, stage), phases, free[rank], what, piece_s, keys_s)
        return _levelled(np.array(free), groups)

    def _lay(
        self,
        place: tuple[int, int],
        phases: Sequence[Phase],
        begin_s: float,
        what: tuple[int, int | None],
        seconds: float,
        keys_s: float,
    ) -> float:
        """The end of what takes a rank with all layers so many seconds, some of them for keys."""
        row = self._spans.get(place)
        for phase in phases:
            share = SHARES[phase] / self._stages
            end_s = begin_s + share * seconds
            if row is not None:
                worked_s = end_s - share * keys_s
                row.append(Span(*place, begin_s, worked_s, "compute", phase, *what))
                if keys_s:
                    row.append(Span(*place, worked_s, end_s, "keys", phase, *what))
            begin_s = end_s
        return begin_s

    def filled(self, step_s: float) -> dict[tuple[int, int], tuple[Span, ...]]:
        """With idle spans where there is none."""
        return {
            place: tuple(_with_idle(place, spans, step_s)) for place, spans in self._spans.items()
        }


def _levelled(times_R: Amounts, groups: Iterable[list[int]]) -> Amounts:
    """Those of each group are its last."""
    levelled_R = times_R.copy()
    for ranks in groups:
        levelled_R[ranks] = times_R[ranks].max()
    return levelled_R


def _with_idle(place: tuple[int, int], spans: Sequence[Span], step_s: float) -> Iterable[Span]:
    """Gaps that are more than roundings."""
    last_s, least_s = 0.0, 1e-9 * step_s
    for span in spans:
        if span.begin_s - last_s > least_s:
            yield Span(*place, last_s, span.begin_s, "idle")
        yield span
        last_s = span.end_s
    if step_s - last_s > least_s:
        yield Span(*place, last_s, step_s, "idle")
