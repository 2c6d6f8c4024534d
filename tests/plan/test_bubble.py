"""The walk of a table, on tables small enough to draw."""

import numpy as np
import pytest

from moesys.plan.bubble import (
    Action,
    Durations,
    interleaved_bubble,
    one_f_one_b,
    one_f_one_b_bubble,
    paper_bubble,
    timed,
    walk,
    zbv_bubble,
)


def actions(text: str) -> list[Action]:
    """ "F0.1 B0.1": kind, stage, micro-batch."""
    parts = (word[1:].split(".") for word in text.split())
    kinds = (word[0] for word in text.split())
    return [Action(k, int(s), int(m)) for k, (s, m) in zip(kinds, parts, strict=True)]  # type: ignore[arg-type]


TWO_RANKS = [actions("F0.0 F0.1 B0.0 B0.1"), actions("F1.0 B1.0 F1.1 B1.1")]
"""
rank 0: F0 F1 .. .. B0 B0 .. B1 B1    wait: B0.0 needs B1.0 (ends at 4), B0.1 needs B1.1 (ends at 7)
rank 1: .. F0 B0 B0 F1 B1 B1
"""


def times(timeline, rank: int) -> list[tuple[float, float]]:
    return [(span.start, span.end) for span in timeline.spans_of_rank[rank]]


def test_a_drawn_table() -> None:
    timeline = walk(TWO_RANKS, Durations())
    assert times(timeline, 0) == [(0, 1), (1, 2), (4, 6), (7, 9)]
    assert times(timeline, 1) == [(1, 2), (2, 4), (4, 5), (5, 7)]
    assert timeline.makespan == 9
    assert timeline.busy_of_rank == (6, 6)
    assert timeline.bubble_of_rank == pytest.approx((1 / 3, 1 / 3))
    assert timeline.bubble_time == 3 == one_f_one_b_bubble(2, Durations())


def test_handing_over_costs_between_ranks_alone() -> None:
    timeline = walk(TWO_RANKS, Durations(), hand_over=0.5)
    assert times(timeline, 1) == [(1.5, 2.5), (2.5, 4.5), (4.5, 5.5), (5.5, 7.5)]
    assert times(timeline, 0) == [(0, 1), (1, 2), (5, 7), (8, 10)]
    one_rank = [actions("F0.0 F1.0 B1.0 B0.0")]
    assert walk(one_rank, Durations(), hand_over=9.0).makespan == 6


def test_the_gradient_of_the_weights_is_waited_for_by_none() -> None:
    table = [actions("F0.0 B0.0"), actions("F1.0 I1.0 W1.0")]
    durations = Durations(forward=1.0, input_gradient=2.0, weight_gradient=4.0)
    timeline = walk(table, durations)
    assert times(timeline, 1) == [(1, 2), (2, 4), (4, 8)]
    assert times(timeline, 0) == [(0, 1), (4, 10)]


def test_a_pair_is_sent_at_its_end() -> None:
    table = [actions("F0.0 F0.1 F0.2 B0.0"), actions("F1.0 B1.0 F1.1 F1.2")]
    assert times(walk(table, Durations()), 1)[2:] == [(4, 5), (5, 6)]
    table[0][2] = table[0][2]._replace(sent_after=1)  # F0.2 with B0.0
    timeline = walk(table, Durations())
    assert times(timeline, 0) == [(0, 1), (1, 2), (2, 3), (4, 6)]
    assert times(timeline, 1)[2:] == [(4, 5), (6, 7)]


def test_stages_differ() -> None:
    timeline = walk(TWO_RANKS, {0: Durations(), 1: Durations(forward=3.0)})
    assert times(timeline, 1) == [(1, 4), (4, 6), (6, 9), (9, 11)]
    assert timeline.busy_of_rank == (6, 10)
    assert timeline.bubble_time == timeline.makespan - 10


def test_micro_batches_differ_and_pipelines_wait_for_each_other() -> None:
    """Micro-batches take 1 and 3 forward and nothing backward, twice as long in the second pipeline; on stage 1 both pipelines
    end together."""

    def end_of(action: Action, start_R: np.ndarray) -> np.ndarray:
        seconds = (1.0 + 2 * action.micro_batch) * (action.kind == "F")
        end_R = start_R + seconds * np.array([1.0, 2.0])
        return np.full(2, end_R.max()) if action.stage == 1 else end_R

    assert one_f_one_b(2, 2) == TWO_RANKS
    first, second = timed(TWO_RANKS, end_of, 2)
    assert [end_R.tolist() for _, _, end_R in first] == [[1, 2], [4, 8], [4, 8], [14, 14]]
    assert [end_R.tolist() for _, _, end_R in second] == [[4, 4], [4, 4], [14, 14], [14, 14]]


@pytest.mark.parametrize(
    "table",
    [
        [actions("F0.0 B0.0"), actions("B1.0 F1.0")],  # backward before forward
        [actions("B0.0 F0.0"), actions("F1.0 B1.0")],
        [actions("F0.0 F0.1"), actions("F1.2")],  # nobody computes F0.2
        [actions("F0.0 W0.0 I0.0")],
    ],
)
def test_a_table_that_stands_still(table: list[list[Action]]) -> None:
    with pytest.raises(ValueError, match="stands still before"):
        walk(table, Durations())


def test_shares_of_the_papers() -> None:
    """Of the step, as they are printed there."""
    for p, n, v in ((2, 8, 2), (4, 8, 1), (8, 32, 3)):
        durations = Durations(forward=2.0, input_gradient=3.0, weight_gradient=1.0)
        work = n * 6.0
        bubble = one_f_one_b_bubble(p, durations)
        assert bubble / (bubble + work) == pytest.approx((p - 1) / (n + p - 1))
        bubble = interleaved_bubble(p, v, n, durations)
        assert bubble / (bubble + v * work) == pytest.approx((p - 1) / (v * n + p - 1))


def test_no_formula_is_made_up() -> None:
    with pytest.raises(ValueError, match="closed form for F = I = W only"):
        zbv_bubble(Durations(forward=2.0))
    with pytest.raises(ValueError, match="no pipeline schedule"):
        paper_bubble("2f2b", 2, 1, 4, Durations())
