"""Faults as text, and drawn: every list is reproducible, in range, and survives being written."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.chaos.faults import (
    KINDS,
    PHASES,
    Fault,
    draw,
    format_faults,
    parse_faults,
    problems_in_run,
    spread,
)


@st.composite
def any_fault(draw_) -> Fault:
    kind = draw_(st.sampled_from(sorted(KINDS)))
    rules = KINDS[kind]
    return Fault(
        kind=kind,
        rank=draw_(st.integers(0, 10**6)),
        step=draw_(st.integers(1, 10**9)),
        phase=draw_(st.sampled_from(rules.phases)),
        seconds=None if rules.seconds is None else draw_(st.floats(0, 86_400)),
    )


@given(st.lists(any_fault(), min_size=1))
def test_written_and_read_again(faults: list[Fault]) -> None:
    assert parse_faults(format_faults(faults)) == tuple(faults)
    assert parse_faults("\n".join(f"{fault}  # why" for fault in faults)) == tuple(faults)


def test_what_is_left_out() -> None:
    assert parse_faults("kill rank=1 step=40; stop step=2 rank=0 phase=save seconds=3\n") == (
        Fault(kind="kill", rank=1, step=40, phase="data"),
        Fault(kind="stop", rank=0, step=2, phase="save", seconds=3.0),
    )
    assert parse_faults("disk_full rank=0 step=5")[0] == Fault(
        kind="disk_full", rank=0, step=5, phase="save", seconds=2.0
    )
    assert parse_faults("nan rank=0 step=5")[0].phase == "optimizer"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no fault is named"),
        ("# only this", "no fault is named"),
        ("kil rank=0 step=1", "did you mean kill?"),
        ("kill rank=0", "step is not given: add step=N"),
        ("kill rank=x step=1", "rank=x must be a whole number of at least 0"),
        ("kill rank=-1 step=1", "rank=-1 must be"),
        ("kill rank=0 step=0", "step=0 must be a whole number of at least 1"),
        ("kill rank=0 step=1 phase=forwards", "did you mean forward?"),
        ("nan rank=0 step=1 phase=data", "phase=data is none of nan"),
        ("kill rank=0 step=1 seconds=2", "kill has no duration"),
        ("slow rank=0 step=1 seconds=nan", "must be a number from 0 to 86400"),
        ("slow rank=0 step=1 seconds=1e9", "must be a number from 0 to 86400"),
        ("kill rank=0 step=1 step=2", "step is given twice, '1' and '2'"),
        ("kill rank=0 step=1 stp=2", "did you mean step?"),
        ("kill rank=0 step=1 now", "'now' is not KEY=VALUE"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^faults: ") as caught:
        parse_faults(text)
    assert said in str(caught.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        parse_faults("kill rank=x; boom rank=1 step=1; slow rank=0 step=3; nan step=0 rank=0")
    lines = str(caught.value).splitlines()
    assert lines[0] == "faults: 4 problems"
    assert [line.split("'")[1].split()[0] for line in lines[1:]] == ["kill", "kill", "boom", "nan"]


sizes = st.fixed_dictionaries(
    {
        "world_size": st.integers(1, 64),
        "mean_steps_between": st.floats(1, 200),
        "phases": st.lists(st.sampled_from(PHASES), unique=True, max_size=2).map(
            lambda more: ["optimizer", "save", *more]
        ),
    }
)
kinds = st.lists(st.sampled_from(sorted(KINDS)), min_size=1, unique=True)


@given(st.integers(), kinds, st.integers(0, 400), sizes)
def test_drawn_faults_are_possible_and_reproducible(seed, kinds, steps, sizes) -> None:
    faults = draw(seed, kinds, steps=steps, **sizes)
    assert faults == draw(seed, kinds, steps=steps, **sizes)
    assert not problems_in_run(
        faults, world_size=sizes["world_size"], steps=steps, phases=sizes["phases"]
    )
    assert {fault.kind for fault in faults} <= set(kinds)
    steps_of = [fault.step for fault in faults]
    assert steps_of == sorted(set(steps_of))
    if faults:
        assert parse_faults(format_faults(faults)) == faults
    shorter = draw(seed, kinds, steps=steps // 2, **sizes)
    assert faults[: len(shorter)] == shorter
    assert all(fault.step > steps // 2 for fault in faults[len(shorter) :])


@given(st.integers(), st.sampled_from(sorted(KINDS)), st.integers(0, 40), st.integers(1, 9), sizes)
def test_spread_faults_leave_room_for_checkpoints(seed, kind, count, every_steps, sizes) -> None:
    sizes = {key: sizes[key] for key in ("world_size", "phases")}
    faults = spread(seed, kind, count, every_steps=every_steps, **sizes)
    assert faults == spread(seed, kind, count, every_steps=every_steps, **sizes)
    assert [fault.kind for fault in faults] == [kind] * count
    checkpoints = [(fault.step - 1) // every_steps for fault in faults]
    assert checkpoints == [2 + 3 * index for index in range(count)]
    assert not problems_in_run(
        faults, world_size=sizes["world_size"], steps=10**9, phases=sizes["phases"]
    )


def test_the_mean_gap_is_the_one_asked_for() -> None:
    faults = draw(1, sorted(KINDS), world_size=4, steps=100_000, mean_steps_between=20)
    assert len(faults) == pytest.approx(100_000 / 20, rel=0.05)
    counts = {kind: sum(fault.kind == kind for fault in faults) for kind in KINDS}
    assert min(counts.values()) > 0.8 * len(faults) / len(KINDS)
    assert {fault.rank for fault in faults} == {0, 1, 2, 3}
    assert {fault.phase for fault in faults} == set(PHASES)
    assert faults != draw(2, sorted(KINDS), world_size=4, steps=100_000, mean_steps_between=20)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kinds": []}, "no kind of fault"),
        ({"kinds": ["kil"]}, "did you mean kill?"),
        ({"kinds": ["nan"], "phases": ["data"]}, "nan needs a phase of optimizer"),
        ({"world_size": 0}, "world_size=0"),
        ({"mean_steps_between": 0.5}, "mean_steps_between=0.5"),
        ({"mean_steps_between": math.nan}, "mean_steps_between=nan"),
        ({"mean_steps_between": math.inf}, "mean_steps_between=inf"),
    ],
)
def test_a_drawing_that_cannot_be(change, said: str) -> None:
    arguments = {"kinds": ["kill"], "world_size": 2, "steps": 9, "mean_steps_between": 2, **change}
    with pytest.raises(ValueError, match="faults: ") as caught:
        draw(0, **arguments)
    assert said in str(caught.value)


def test_faults_that_a_run_does_not_have() -> None:
    faults = parse_faults("kill rank=2 step=30 phase=exchange; slow rank=1 step=20")
    problems = problems_in_run(faults, world_size=2, steps=24, phases=("data", "forward"))
    assert [problem.partition("': ")[2].split()[0] for problem in problems] == [
        "rank",
        "step",
        "this",
    ]
