"""How long batch plans take. Pure.

Sequences of a micro-step on the same ranks go around these as one block, and wait for keys together.

Shapes: R ranks, M micro-steps.
"""

from collections.abc import Sequence

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.plan import BatchPlan, Piece
from moesys.plan.placement import Amounts, Integers


class BatchSeconds:
    """Of plans of one batch, of which planners look at many: what a sequence takes on so many ranks is worked out once."""

    def __init__(self, lengths_S: Integers, num_ranks: int, costs: BatchCosts) -> None:
        self._lengths: list[int] = lengths_S.tolist()
        self._num_ranks, self._costs = num_ranks, costs
        self._known: dict[tuple[int, int], tuple[float, float]] = {}
        """Of a length and a number of ranks: `own_s` and `behind_s`."""

    def of_pieces(self, step: Sequence[Piece]) -> list[tuple[float, float]]:
        """Of a micro-step: what each takes each of its ranks, and of this what they wait for keys, shared out by tokens."""
        known = self._known_of(step)
        rings: dict[tuple[int, ...], tuple[int, float]] = {}
        for (sequence, ranks), (_, behind_s) in zip(step, known, strict=True):
            if len(ranks) > 1:
                tokens, sum_s = rings.get(ranks, (0, 0.0))
                rings[ranks] = tokens + self._lengths[sequence], sum_s + behind_s
        waited_s = {
            ranks: (len(ranks) - 1) * max(0.0, self._costs.hop_s + sum_s)
            for ranks, (_, sum_s) in rings.items()
        }
        found: list[tuple[float, float]] = []
        for (sequence, ranks), (own_s, _) in zip(step, known, strict=True):
            if len(ranks) == 1:
                found.append((own_s, 0.0))
            else:
                keys_s = waited_s[ranks] * (self._lengths[sequence] / rings[ranks][0])
                found.append((own_s + keys_s, keys_s))
        return found

    def of_ranks(self, step: Sequence[Piece]) -> list[float]:
        """Of a micro-step, each rank's own work."""
        busy = [0.0] * self._num_ranks
        for (_, ranks), (piece_s, _) in zip(step, self.of_pieces(step), strict=True):
            for rank in ranks:
                busy[rank] += piece_s
        beside_s = self._costs.micro_step_s
        return [own_s + beside_s if own_s else 0.0 for own_s in busy]

    def in_step(self, steps: Sequence[Sequence[Piece]], stages: int = 1) -> float:
        """Of a batch whose ranks meet in every layer, as they do for experts: each micro-step takes as long as its slowest rank.
        In a pipeline the longest counts once more for each stage but one."""
        each_s = [max(self.of_ranks(step)) for step in steps]
        return sum(each_s) + (stages - 1) * max(each_s, default=0.0)

    def free(self, steps: Sequence[Sequence[Piece]]) -> float:
        """Of a batch whose ranks meet in rings alone: those of a ring in every layer, so that they begin and end a micro-step
        together, with all that they have in it."""
        free = [0.0] * self._num_ranks
        for step in steps:
            busy = self.of_ranks(step)
            for ranks in meeting(step):
                begin_s = max([free[rank] for rank in ranks])
                most_s = max([busy[rank] for rank in ranks])
                for rank in ranks:
                    free[rank], busy[rank] = begin_s, most_s
            free = list(map(float.__add__, free, busy))
        return max(free)

    def _known_of(self, step: Sequence[Piece]) -> list[tuple[float, float]]:
        lengths = self._lengths
        keys = [(lengths[sequence], len(ranks)) for sequence, ranks in step]
        if new := list({key for key in keys if key not in self._known}):
            length, size = np.array(new).T
            own_s, behind_s = self._costs.own_s(length, size), self._costs.behind_s(length, size)
            self._known.update(
                zip(new, zip(own_s.tolist(), behind_s.tolist(), strict=True), strict=True)
            )
        return [self._known[key] for key in keys]


def rank_seconds(plan: BatchPlan, costs: BatchCosts) -> Amounts:
    """fp64 [M, R]: seconds of each rank's own work in each micro-step."""
    seconds = BatchSeconds(plan.lengths_S, plan.num_ranks, costs)
    rows = [seconds.of_ranks(step) for step in plan.micro_steps]
    return np.array(rows, dtype=np.float64).reshape(-1, plan.num_ranks)


def plan_seconds(plan: BatchPlan, costs: BatchCosts, *, meets: bool) -> float:
    """Of ranks that meet in every layer, or in rings alone."""
    seconds = BatchSeconds(plan.lengths_S, plan.num_ranks, costs)
    return (seconds.in_step if meets else seconds.free)(plan.micro_steps)


def meeting(step: Sequence[Piece]) -> list[list[int]]:
    """Ranks that a micro-step's rings join, in one or over others."""
    joined: dict[int, list[int]] = {}
    for _, ranks in step:
        if len(ranks) > 1:
            others = {id(group): group for rank in ranks if (group := joined.get(rank))}
            whole = max(others.values(), key=len, default=[])
            for group in others.values():
                if group is not whole:
                    whole += group
                    joined.update(dict.fromkeys(group, whole))
            new = [rank for rank in ranks if rank not in joined]
            whole += new
            joined.update(dict.fromkeys(new, whole))
    return list({id(group): group for group in joined.values()}.values())
