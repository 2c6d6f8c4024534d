"""Timelines of batch plans: what a rank does adds up, nobody does two things at once, pipelines keep their order.

Shapes: R data ranks.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.figures import figures
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.batch.policies import POLICIES, batch_seconds, planned
from moesys.plan.batch.seconds import rank_seconds
from moesys.plan.batch.timeline import BatchTimeline, Span, timeline
from tests.plan.batch.test_planners import CAPACITY, COSTS, random_lengths
from tests.plan.placements import seeds

PLANS = (seeds(), st.sampled_from(POLICIES), st.integers(1, 6), st.booleans())
LINEAR = BatchCosts(attention=(AttentionKind(pair_s=0.0),), token_s=1.0)


def any_plan(rng: np.random.Generator, policy: str, num_ranks: int, meets: bool) -> BatchPlan:
    lengths_S = random_lengths(rng, num_ranks)
    return planned(policy, lengths_S, num_ranks, CAPACITY, COSTS, meets=meets)


def busy(found: BatchTimeline) -> list[Span]:
    return [span for row in found.spans.values() for span in row if span.kind != "idle"]


@given(*PLANS)
def test_one_stage_ends_when_the_costs_say(
    rng: np.random.Generator, policy: str, num_ranks: int, meets: bool
) -> None:
    plan = any_plan(rng, policy, num_ranks, meets)
    found = timeline(plan, COSTS, meets=meets)
    assert found.step_s == pytest.approx(batch_seconds(plan, COSTS, meets=meets), rel=1e-12)


@given(*PLANS, st.integers(1, 4))
def test_rows_are_whole_and_add_up(
    rng: np.random.Generator, policy: str, num_ranks: int, meets: bool, stages: int
) -> None:
    """No gap, nothing twice; a rank's work is what it costs, in every stage the same share of it."""
    plan = any_plan(rng, policy, num_ranks, meets)
    found = timeline(plan, COSTS, stages=stages, meets=meets)
    assert list(found.spans) == [*itertools.product(range(num_ranks), range(stages))]
    cost_R, keys_R = rank_seconds(plan, COSTS).sum(0), np.zeros(num_ranks)
    around: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index, piece in plan.pieces():
        around.setdefault((index, piece.ranks), []).append(piece.sequence)
    for (_, ranks), together in around.items():
        behind_s = COSTS.behind_s(plan.lengths_S[together], len(ranks)).sum()
        keys_R[list(ranks)] += (len(ranks) - 1) * max(0.0, COSTS.hop_s + behind_s)
    close = 1e-8 * found.step_s
    for (rank, stage), row in found.spans.items():
        if found.step_s:
            assert [row[0].begin_s, row[-1].end_s] == pytest.approx([0, found.step_s], abs=close)
        for span, following in itertools.pairwise(row):
            assert following.begin_s == pytest.approx(span.end_s, abs=close)
        assert {(span.rank, span.stage) for span in row} <= {(rank, stage)}
        worked_s = sum(span.end_s - span.begin_s for span in row if span.kind != "idle")
        assert worked_s == pytest.approx(cost_R[rank] / stages, rel=1e-9, abs=1e-15)
        keys_s = sum(span.end_s - span.begin_s for span in row if span.kind == "keys")
        assert keys_s == pytest.approx(keys_R[rank] / stages, rel=1e-9, abs=1e-15)


@given(*PLANS, st.integers(2, 4))
def test_pipelines_keep_their_order(
    rng: np.random.Generator, policy: str, num_ranks: int, meets: bool, stages: int
) -> None:
    plan = any_plan(rng, policy, num_ranks, meets)
    found = timeline(plan, COSTS, stages=stages, meets=meets)
    begins: dict[tuple, float] = {}
    ends: dict[tuple, float] = {}
    for span in busy(found):
        at = (span.rank, span.micro_step, span.phase, span.stage)
        begins[at] = min(begins.get(at, np.inf), span.begin_s)
        ends[at] = max(ends.get(at, 0.0), span.end_s)
    close = 1e-8 * found.step_s
    for (rank, index, phase, stage), begin_s in begins.items():
        before = stage - 1 if phase == "forward" else stage + 1
        if 0 <= before < stages:
            assert begin_s >= ends[rank, index, phase, before] - close
        if phase == "backward":
            assert begin_s >= ends[rank, index, "forward", stage] - close
    if meets:
        for at, begin_s in begins.items():
            others = [
                begins[(rank, *at[1:])] for rank in range(num_ranks) if (rank, *at[1:]) in begins
            ]
            assert begin_s == pytest.approx(min(others), abs=close)


@given(*PLANS, st.integers(1, 4))
def test_ranks_of_a_ring_begin_and_end_a_micro_step_together(
    rng: np.random.Generator, policy: str, num_ranks: int, meets: bool, stages: int
) -> None:
    """None of them goes on with what follows before the last of them has ended; with one stage forward and backward of a
    micro-step are one."""
    plan = any_plan(rng, policy, num_ranks, meets)
    found = timeline(plan, COSTS, stages=stages, meets=False)

    def part(span: Span) -> tuple:
        return span.rank, span.stage, span.micro_step, span.phase if stages > 1 else None

    times: dict[tuple, tuple[float, float, float]] = {}
    for row in found.spans.values():
        works = [span for span in row if span.kind != "idle"]
        parts = [list(spans) for _, spans in itertools.groupby(works, part)]
        for spans, after in itertools.zip_longest(parts, parts[1:]):
            goes_on_s = after[0].begin_s if after else np.inf
            times[part(spans[0])] = spans[0].begin_s, spans[-1].end_s, goes_on_s
    phases = ("forward", "backward") if stages > 1 else (None,)
    for index, piece in plan.pieces():
        for stage, phase in itertools.product(range(stages), phases):
            of_ring = [times[rank, stage, index, phase] for rank in piece.ranks]
            begins, ends, goes_on = zip(*of_ring, strict=True)
            assert len(set(begins)) == 1
            assert min(goes_on) >= max(ends) - 1e-8 * found.step_s


@pytest.mark.parametrize("meets", [False, True])
@pytest.mark.parametrize(("stages", "number"), [(1, 3), (2, 8), (4, 8), (4, 3), (8, 32)])
def test_equal_micro_batches_have_the_bubble_of_1f1b(stages: int, number: int, meets: bool) -> None:
    """2104.04473, section 2.2."""
    steps = [[Piece(2 * index, (0,)), Piece(2 * index + 1, (1,))] for index in range(number)]
    plan = batch_plan(np.full(2 * number, 6), 2, steps)
    found = timeline(plan, LINEAR, stages=stages, meets=meets)
    told = figures(plan, LINEAR, found.step_s, stages=stages, block_token_bytes=7)
    assert told.idle_share == pytest.approx((stages - 1) / (number + stages - 1))
    assert found.step_s == pytest.approx(6 * (number + stages - 1) / stages)
    assert told.held_tokens == 6 * min(stages, number)


def test_a_pipeline_by_hand() -> None:
    """Two stages, of which each takes half: 3 and 6 forward, 6 and 12 backward of the micro-steps of 18 and 36 tokens.

    stage 0: F0 0-3, F1 3-9, B0 12-18 (once stage 1 has done B0), B1 30-42
    stage 1: F0 3-6, B0 6-12, F1 12-18, B1 18-30
    """
    plan = batch_plan(np.array([18, 36]), 1, [[Piece(0, (0,))], [Piece(1, (0,))]])
    found = timeline(plan, LINEAR, stages=2, meets=False)
    works = {
        stage: [
            (span.begin_s, span.end_s) for span in found.spans[0, stage] if span.kind == "compute"
        ]
        for stage in (0, 1)
    }
    assert works[0] == [(0, 3), (3, 9), (12, 18), (pytest.approx(30), pytest.approx(42))]
    assert works[1] == [(3, 6), (6, 12), (12, 18), (18, 30)]
    assert found.step_s == pytest.approx(42)


def test_backwards_take_pieces_in_reverse_order() -> None:
    """As autograd does; and rank 1 of the ring, with less in this micro-step, waits for rank 0 at the end of each phase.

    A forward takes a stage 3 for sequence 0, and 3 on each rank for sequence 1.
    """
    plan = batch_plan(np.array([18, 36]), 2, [[Piece(0, (0,)), Piece(1, (0, 1))]])
    found = timeline(plan, LINEAR, stages=2, meets=False)
    full, partner = (
        [
            (span.phase, span.sequence, pytest.approx(span.begin_s), pytest.approx(span.end_s))
            for span in found.spans[rank, 1]
            if span.kind == "compute"
        ]
        for rank in (0, 1)
    )
    assert full == [
        ("forward", 0, 6, 9),
        ("forward", 1, 9, 12),
        ("backward", 1, 12, 18),
        ("backward", 0, 18, 24),
    ]
    assert partner == [("forward", 1, 6, 9), ("backward", 1, 12, 18)]


def test_ranks_that_rings_join_wait_for_the_slowest_of_them() -> None:
    """Rings in a row join ranks 0 to 2, which have 18, 20 and 10 seconds; rank 3 waits only where all meet."""
    plan = batch_plan(
        np.array([8, 20, 20, 4, 5, 12]),
        4,
        [
            [Piece(0, (0,)), Piece(1, (0, 1)), Piece(2, (1, 2)), Piece(3, (3,))],
            [Piece(4, (2,)), Piece(5, (3,))],
        ],
    )
    together, apart = (timeline(plan, LINEAR, meets=meets) for meets in (True, False))
    assert (together.step_s, apart.step_s) == (pytest.approx(32), pytest.approx(25))

    def idle(found: BatchTimeline) -> list[list[tuple[float, float]]]:
        """Of each rank."""
        return [
            [
                (round(span.begin_s, 9), round(span.end_s, 9))
                for span in found.spans[rank, 0]
                if span.kind == "idle"
            ]
            for rank in range(4)
        ]

    assert idle(together) == [[(18, 32)], [(20, 32)], [(10, 20), (25, 32)], [(4, 20)]]
    assert idle(apart) == [[(18, 25)], [(20, 25)], [(10, 20)], [(16, 25)]]


def test_only_some_ranks_are_kept() -> None:
    plan = batch_plan(np.array([6, 9]), 3, [[Piece(0, (0,)), Piece(1, (2,))]])
    found = timeline(plan, LINEAR, meets=False, ranks=[2, 1])
    assert found.spans == {
        (1, 0): (Span(1, 0, 0.0, 9.0, "idle"),),
        (2, 0): (
            Span(2, 0, 0.0, 3.0, "compute", "forward", 0, 1),
            Span(2, 0, 3.0, 9.0, "compute", "backward", 0, 1),
        ),
    }
    nothing = timeline(batch_plan(np.array([0]), 2, []), LINEAR, meets=True)
    assert (nothing.step_s, nothing.spans) == (0.0, {(0, 0): (), (1, 0): ()})


def test_figures_by_hand() -> None:
    """8 tokens on two ranks take 70 s each, 6 of them for keys (tests/plan/batch/test_cost.py); a token alone 14."""
    costs = BatchCosts(
        attention=(AttentionKind(pair_s=1.0),),
        token_s=10.0,
        piece_s=3.0,
        block_token_s=4.0,
        hop_s=2.0,
    )
    plan = batch_plan(np.array([8, 1]), 2, [[Piece(0, (0, 1))], [Piece(1, (0,))]])
    told = figures(plan, costs, 84.0, block_token_bytes=5)
    assert told.keys_share == pytest.approx(2 * 6 / 168)
    assert told.idle_share == pytest.approx(14 / 168)
    assert told.ring_bytes == 8 * 5
    assert told.over_even == pytest.approx(168 / (36 + 80 + 1 + 10))
    assert (told.peak_tokens, told.held_tokens, told.micro_steps) == (4, 4, 2)
    assert figures(plan, costs, 84.0, stages=2, block_token_bytes=5).held_tokens == 5
