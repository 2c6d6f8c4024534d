"""Micro-batches in flight by formula, against the orders that torch's schedules run."""

from collections import Counter
from itertools import product

import pytest

from moesys.parallelize.schedules import action_table
from moesys.plan.bubble import Action
from moesys.plan.in_flight import micro_batches_in_flight
from moesys.plan.pipeline import LOOPED, SCHEDULES, schedule_problems, stages_per_rank


def held(actions: list[Action]) -> list[dict[int, int]]:
    """By stage, after each forward."""
    counts: Counter[int] = Counter()
    found = []
    for action in actions:
        if action.kind == "F":
            counts[action.stage] += 1
            found.append(dict(counts))
        elif action.kind in ("B", "W"):
            counts[action.stage] -= 1
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_many_as_torch_runs(schedule):
    checked = 0
    for p, v, n in product((1, 2, 3, 8), (1, 2, 3) if schedule in LOOPED else (2,), range(1, 18)):
        num_stages = p * stages_per_rank(schedule, v)
        if schedule_problems(schedule, p, v, n, num_stages):
            continue
        for rank, actions in enumerate(action_table(schedule, p, v, n)):
            formula = micro_batches_in_flight(schedule, rank, p, v, n)
            moments = held(actions)
            most = max(sum(moment.values()) for moment in moments)
            assert sum(formula) == most, (p, v, n, rank)
            stages = sorted({action.stage for action in actions})
            at_once = [tuple(moment.get(stage, 0) for stage in stages) for moment in moments]
            assert formula in at_once, (p, v, n, rank)
            checked += 1
    assert checked >= 50


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'2f2b' is no pipeline schedule"):
        micro_batches_in_flight("2f2b", 0, 2, 1, 4)
