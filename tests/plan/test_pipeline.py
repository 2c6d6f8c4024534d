"""Layer cuts against brute force; which rank runs which stage; what a schedule needs."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesys.config.schema import ParallelConfig
from moesys.plan.pipeline import (
    SCHEDULES,
    ScheduleProblem,
    layers_of_ranks,
    layers_of_stages,
    schedule_problems,
    split_layers,
    stages_of_rank,
    stages_per_rank,
)
from moesys.testing.small_run import small_model


def all_cuts(num_layers: int, num_stages: int) -> Iterator[list[list[int]]]:
    for starts in combinations(range(1, num_layers), num_stages - 1):
        ends = [0, *starts, num_layers]
        yield [list(range(ends[i], ends[i + 1])) for i in range(num_stages)]


def stage_costs(
    stages: list[list[int]], costs: Sequence[float], first: float, last: float
) -> list[float]:
    found: list[float] = [sum(costs[layer] for layer in stage) for stage in stages]
    found[0] += first
    found[-1] += last
    return found


@st.composite
def models(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Costs of the layers, stages, cost of the two ends. Integers, so that equal sums are equal."""
    costs = draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    ends = st.integers(0, 30)
    return costs, draw(st.integers(1, len(costs))), draw(ends), draw(ends)


@settings(max_examples=300)
@given(model=models())
@example(
    model=([1, 9, 1, 9, 4, 7, 4, 3, 5], 5, 5, 18)
)  # the costly last stage leaves the others free
@example(model=([1, 9, 3, 3, 2], 3, 0, 0))  # the evenest cut of all has not the best pace
def test_no_cut_is_better(model: tuple[list[int], int, int, int]) -> None:
    costs, num_stages, first, last = model
    stages = split_layers(costs, num_stages, first_cost=first, last_cost=last)

    assert [layer for stage in stages for layer in stage] == list(range(len(costs)))
    assert len(stages) == num_stages
    assert all(stages)

    def badness(cut: list[list[int]]) -> tuple[float, float]:
        of_stage = stage_costs(cut, costs, first, last)
        return max(of_stage), sum(cost**2 for cost in of_stage)

    assert badness(stages) == min(map(badness, all_cuts(len(costs), num_stages)))


def test_ends_of_the_model_make_their_stages_shorter() -> None:
    costs = [1.0] * 12
    assert [len(s) for s in split_layers(costs, 4)] == [3, 3, 3, 3]
    assert [len(s) for s in split_layers(costs, 4, last_cost=2.0)] == [3, 3, 4, 2]
    assert len(split_layers(costs, 4, first_cost=3.0)[0]) == 1


def test_too_few_layers() -> None:
    with pytest.raises(ValueError, match="3 layers cannot make 4 pipeline stages"):
        split_layers([1, 1, 1], 4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("virtual_stages", [1, 2, 3])
@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
def test_each_stage_is_on_one_rank(schedule: str, pp: int, virtual_stages: int) -> None:
    ranks = [stages_of_rank(schedule, rank, pp, virtual_stages) for rank in range(pp)]
    per_rank = stages_per_rank(schedule, virtual_stages)
    assert all(len(stages) == per_rank and stages == sorted(stages) for stages in ranks)
    assert sorted(stage for stages in ranks for stage in stages) == list(range(pp * per_rank))


def test_the_shapes_of_the_maps() -> None:
    assert [stages_of_rank("1f1b", r, 3, 2) for r in range(3)] == [[0], [1], [2]]
    assert [stages_of_rank("interleaved", r, 2, 3) for r in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [stages_of_rank("zbv", r, 3, 9) for r in range(3)] == [[0, 5], [1, 4], [2, 3]]


def with_value(problem: ScheduleProblem, works: int, arguments: dict[str, int]) -> dict[str, int]:
    name = problem.key.removeprefix("parallel.").removeprefix("pp_")
    return {**arguments, name: works}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_fix_works(schedule: str) -> None:
    num_found = 0
    for pp in range(1, 5):
        for virtual_stages in range(1, 4):
            for num_micro_batches in range(1, 13):
                for num_layers in (1, 2, 3, 5, 8, 12):
                    arguments = {
                        "pp": pp,
                        "virtual_stages": virtual_stages,
                        "num_micro_batches": num_micro_batches,
                        "num_layers": num_layers,
                    }
                    found = schedule_problems(schedule, **arguments)
                    num_found += len(found)
                    for problem in found:
                        key = problem.key
                        for works in problem.works:
                            changed = with_value(problem, works, arguments)
                            assert changed != arguments
                            left = {p.key for p in schedule_problems(schedule, **changed)}
                            assert not left & ({key, "parallel.pp"} if "pp" in key else {key})
                        if problem.schedule:
                            assert not schedule_problems(problem.schedule, **arguments)
                        assert problem.works or problem.schedule or num_layers < pp * 2
    assert num_found


def test_a_problem_reads_as_a_sentence() -> None:
    [problem] = schedule_problems("interleaved", 4, 2, 9, 8)
    assert (problem.key, problem.given, problem.works) == ("num_micro_batches", 9, (8, 10))
    assert problem.rule == (
        "must be a multiple of its 2 rounds (9 // parallel.pp=4) with parallel.pp_schedule=interleaved"
    )
    assert problem.fix == "use 8 or 10, or parallel.pp_schedule=1f1b"
    layers, batches = schedule_problems("dualpipev", 4, 2, 3, 7)
    assert (layers.key, layers.works, layers.schedule) == ("parallel.pp", (3,), "gpipe")
    assert (batches.key, batches.works, batches.schedule) == ("num_micro_batches", (8,), "gpipe")
    assert schedule_problems("zbv", 4, 2, 1, 8) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_layers_of_a_rank_are_those_of_its_stages(schedule: str) -> None:
    model = small_model(num_layers=9, mtp_depth=1)
    parallel = ParallelConfig(pp=2, pp_schedule=schedule)  # type: ignore[arg-type]
    of_stages = layers_of_stages(model, parallel, 16)
    found = layers_of_ranks(model, parallel, 16)
    assert sorted(layer for layers in found for layer in layers) == list(range(10))
    for rank, layers in enumerate(found):
        stages = stages_of_rank(schedule, rank, 2, parallel.pp_virtual_stages)
        assert layers == [layer for stage in stages for layer in of_stages[stage]]
    assert layers_of_ranks(model, ParallelConfig(), 16) == [list(range(10))]
