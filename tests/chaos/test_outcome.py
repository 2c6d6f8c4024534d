"""What became of a fault, from events that are made up: times, steps lost, and who is to blame."""

import pytest

from moesys.chaos.faults import parse_faults
from moesys.chaos.outcome import (
    Event,
    Sample,
    first_difference,
    growth,
    markdown,
    outcomes,
    row_of,
    survived_pct,
)


def seen(text: str) -> list[Event]:
    """ "1.0 step 4; 1.5 fault 0 5; 1.6 ended r1; 1.8 said; 4 start 3; 5 job_ended 0"."""
    events = []
    for part in text.split(";"):
        at_s, kind, *rest = part.split()
        word = rest[0] if rest else ""
        events.append(
            Event(
                at_s=float(at_s),
                kind=kind,  # type: ignore[arg-type]
                rank=int(word[1:]) if kind == "ended" else None,
                step=int(rest[-1]) if kind in ("step", "start") or len(rest) > 1 else 0,
                ordinal=int(word) if kind == "fault" else -1,
                text=word if kind == "job_ended" else "oh" if kind == "said" else "",
            )
        )
    return events


KILL = "0 job_started; 1 start 0; 2 step 6; 3 step 7; 3.5 fault 0; 3.6 ended r1"


def test_a_kill_with_a_restart_in_place() -> None:
    events = seen(
        f"{KILL}; 3.75 said; 4 ended r0; 6 start 5; 7 step 6; 7.5 step 7; 8 step 8; 9 step 9"
    )
    (found,) = outcomes(parse_faults("kill rank=1 step=8"), events)
    assert (found.found_s, found.found_by) == (0.25, "oh")
    assert found.back_s == 4.5  # steps 6 and 7 are not new
    assert (found.steps_lost, found.restarts, found.relaunches) == (2, 1, 0)
    assert found.survived


def test_the_end_of_the_killed_rank_is_the_fault_not_its_finding() -> None:
    (found,) = outcomes(parse_faults("kill rank=1 step=8"), seen(f"{KILL}; 4 ended r0"))
    assert (found.found_s, found.found_by) == (0.5, "rank 0 ended")
    assert found.back_s is None
    assert not found.survived
    (raised,) = outcomes(parse_faults("exception rank=1 step=8"), seen(KILL))
    assert raised.found_s == pytest.approx(0.1)
    # A rank that is killed again later has then been found.
    (again,) = outcomes(parse_faults("kill rank=1 step=8"), seen(f"{KILL}; 5 ended r1"))
    assert again.found_s == 1.5


def test_a_launcher_that_gave_up_did_not_survive() -> None:
    events = seen(f"{KILL}; 4 ended r0; 5 job_ended 1; 6 job_started; 8 start 5; 9 step 8")
    (found,) = outcomes(parse_faults("kill rank=1 step=8"), events)
    assert (found.restarts, found.relaunches, found.back_s) == (0, 1, 5.5)
    assert not found.survived


def test_steps_of_ranks_that_have_lost_their_agent_are_no_recovery() -> None:
    events = seen(
        "2 step 6; 2.5 fault 0; 2.6 step 7; 2.8 said; 2.9 step 8; 3 ended r0; 3 ended r1; 8 start 5; 9 step 6; "
        "10 step 7; 11 step 8; 12 step 9"
    )
    (found,) = outcomes(parse_faults("agent rank=1 step=7"), events)
    assert found.found_s == pytest.approx(0.3)
    assert (found.back_s, found.steps_lost) == (9.5, 3)
    assert (found.restarts, found.relaunches, found.survived) == (1, 0, True)


def test_a_fault_that_ends_nothing() -> None:
    faults = parse_faults("slow rank=0 step=7; slow rank=0 step=9")
    events = seen(
        "1 start 0; 2 step 6; 2.5 fault 0; 4 step 7; 4.5 said; 5 step 8; 6 fault 1; 7 job_ended 0"
    )
    first, second = outcomes(faults, events)
    assert (first.found_s, first.back_s, first.steps_lost, first.survived) == (None, 1.5, 0, True)
    assert (second.back_s, second.survived) == (1.0, True)  # the job's end is as good as a step


def test_the_record_of_the_step_before_may_come_late() -> None:
    (found,) = outcomes(
        parse_faults("slow rank=0 step=7"), seen("2 fault 0 7; 2.1 step 6; 4 step 7; 5 step 8")
    )
    assert found.back_s == 2
    # A save is written while later steps are done.
    events = seen("1 step 8; 2 fault 0 7; 2.1 step 9; 3 step 10")
    (found,) = outcomes(parse_faults("slow rank=0 step=7 phase=save"), events)
    assert (found.back_s, found.steps_lost) == (pytest.approx(0.1), 0)
    (found,) = outcomes(
        parse_faults("kill rank=0 step=7 phase=save"),
        seen("1 step 7; 2 fault 0 7; 3 start 5; 4 step 6; 5 step 7; 6 step 8"),
    )
    assert (found.back_s, found.steps_lost) == (4, 2)


def test_a_step_that_was_done_with_a_fault_found_later_counts_for_nothing() -> None:
    events = seen(
        "1 step 16; 2 fault 0 17; 3 step 17; 4 said; 5 ended r0; 8 start 15; 9 step 16; 10 step 17; 11 step 18"
    )
    (found,) = outcomes(parse_faults("bit_flip rank=2 step=17"), events)
    assert (found.found_s, found.back_s, found.steps_lost, found.restarts) == (2, 9, 2, 1)


def test_back_is_behind_the_last_start() -> None:
    events = seen(
        f"{KILL}; 3.75 said; 6 start 5; 7 step 6; 8 start 5; 9 step 6; 10 step 7; 11 step 8"
    )
    (found,) = outcomes(parse_faults("kill rank=1 step=8"), events)
    assert (found.found_s, found.back_s, found.steps_lost, found.restarts) == (0.25, 7.5, 2, 2)


def test_what_comes_after_the_next_fault_is_not_of_the_one_before() -> None:
    faults = parse_faults("stop rank=0 step=7; kill rank=1 step=8; kill rank=1 step=90")
    events = seen("2 step 6; 2.5 fault 0; 3 fault 1; 4 said; 5 start 4; 6 step 7")
    first, second, third = outcomes(faults, events)
    assert (first.found_s, first.back_s, first.survived) == (None, None, True)
    assert first.is_overtaken
    assert (second.found_s, second.back_s, second.steps_lost) == (1, 3, 2)
    assert not third.happened
    assert not third.survived


def test_losses_are_compared_bit_by_bit() -> None:
    assert first_difference({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0}) is None
    assert first_difference({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0000000000000004}) == 2
    assert first_difference({1: 2.0, 2: 3.0}, {1: 2.0}) == 2


def test_growth_leaves_the_start_out() -> None:
    flat = [Sample(num_descriptors=20, memory_bytes=100)] * 30
    start = [Sample(num_descriptors=3, memory_bytes=1)] * 5
    assert growth(start + flat) == Sample(num_descriptors=0, memory_bytes=0)
    leak = [Sample(num_descriptors=20 + i, memory_bytes=100 * i) for i in range(16)]
    assert growth(leak) == Sample(num_descriptors=8, memory_bytes=800)
    assert growth(leak[:7]) is None


def test_a_row_and_its_table() -> None:
    faults = parse_faults("kill rank=1 step=8; kill rank=1 step=10; kill rank=1 step=50")
    events = seen(
        f"{KILL}; 3.75 said; 6 start 5; 8 step 8; 9 fault 1; 9.1 ended r1; 10 said; 12 job_ended 1"
    )
    row = row_of("kill", outcomes(faults, events), exact=False)
    assert row == {
        "fault": "kill",
        "seeds": 2,
        "survived": 1,
        "found_s": 0.625,
        "found_max_s": 1.0,
        "back_s": 4.5,
        "back_max_s": 4.5,
        "steps_lost": 1.0,
        "steps_lost_max": 2,
        "exact": False,
    }
    assert survived_pct([row]) == 50
    assert survived_pct([]) == 0
    assert markdown([row]).splitlines()[2] == (
        "| kill | 2 | 1 | 0.62 | 1 | 4.5 | 4.5 | 1 | 2 | no |"
    )
