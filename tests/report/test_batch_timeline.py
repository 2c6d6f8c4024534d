"""Drawn batch plans: what is joined, what a box says, one axis for all panels, an SVG that any reader can parse.

Shapes: S sequences.
"""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.batch.timeline import Span, timeline
from moesys.report.batch_boxes import boxes
from moesys.report.batch_timeline import Panel, batch_svg, drawn_ranks, standalone

COSTS = BatchCosts(attention=(AttentionKind(pair_s=1.0),), token_s=10.0, block_token_s=4.0)
PLAN = batch_plan(
    np.array([100, 8, 3, 2, 5]),
    3,
    [[Piece(0, (0, 1)), Piece(1, (2,)), Piece(2, (2,)), Piece(3, (2,))], [Piece(4, (1, 2))]],
)
SVG = "{http://www.w3.org/2000/svg}"


def panel(
    plan: BatchPlan = PLAN, *, name: str = "mine", stages: int = 1, slower: float = 1.0
) -> Panel:
    costs = BatchCosts(
        attention=(AttentionKind(pair_s=slower),), token_s=10.0 * slower, block_token_s=4.0 * slower
    )
    ranks = drawn_ranks(plan.num_ranks, stages)
    found = timeline(plan, costs, stages=stages, meets=False, ranks=ranks)
    return Panel(name=name, plan=plan, timeline=found, figures=[("3 s", "step"), ("7 %", "idle")])


def drawn(*panels: Panel) -> ET.Element:
    return ET.fromstring(standalone(batch_svg(panels, "a & b")))


def of_kind(root: ET.Element, kind: str) -> list[tuple[float, float, float, float]]:
    """x, y, width, height of boxes of a class, without the legend's."""
    found = []
    for path in root.iter(f"{SVG}path"):
        if kind in path.attrib["class"].split():
            x, y, wide, high = map(float, re.findall(r"[\d.]+", path.attrib["d"])[:4])
            found += [(x, y, wide, high)] if y > 60 else []
    return found


def titles(root: ET.Element) -> list[str]:
    return [title.text or "" for title in root.iter(f"{SVG}title")]


def test_a_forward_and_its_backward_are_a_box_or_two() -> None:
    row = timeline(PLAN, COSTS, meets=False).spans[0, 0]
    (one,) = boxes(row, with_phases=False, long={0}, least_s=0.0)
    two = boxes(row, with_phases=True, long={0}, least_s=0.0)
    assert (one.sequences, one.phase, one.begin_s, one.end_s) == ([0], None, 0.0, two[1].end_s)
    assert [box.phase for box in two] == ["forward", "backward"]
    assert one.keys_s == pytest.approx(sum(box.keys_s for box in two))


def test_short_pieces_share_a_box_until_it_is_wide_enough() -> None:
    row = timeline(PLAN, COSTS, meets=False).spans[2, 0]
    told = {"with_phases": False, "long": {0}}
    apart = boxes(row, **told, least_s=0.0)
    assert [box.sequences for box in apart] == [[1], [2], [3], [4]]
    joined = boxes(row, **told, least_s=apart[1].end_s)
    assert [box.sequences for box in joined] == [[1, 2], [3], [4]]
    assert joined[0].end_s == apart[1].end_s
    alone = boxes(row, with_phases=False, long={1}, least_s=1e9)
    assert [box.sequences for box in alone] == [[1], [2, 3], [4]]


def test_nothing_is_joined_over_micro_steps() -> None:
    plan = batch_plan(np.array([3, 2, 4]), 1, [[Piece(0, (0,)), Piece(1, (0,))], [Piece(2, (0,))]])
    row = timeline(plan, COSTS, meets=False).spans[0, 0]
    found = boxes(row, with_phases=False, long=(), least_s=1e9)
    assert [box.sequences for box in found] == [[0, 1], [2]]


def test_nothing_is_joined_over_idle_time() -> None:
    spans = [Span(0, 0, begin, begin + 1.0, "compute", "forward", 0, 7) for begin in (0.0, 2.0)]
    found = boxes(spans, with_phases=False, long=(), least_s=9.0)
    assert [(box.begin_s, box.end_s) for box in found] == [(0.0, 1.0), (2.0, 3.0)]


def test_a_box_says_what_it_is() -> None:
    found = titles(drawn(panel()))
    assert any(
        title.startswith("sequence 0, 100 tokens, on 2 ranks, 0 to 1, micro-step 0, ")
        for title in found
    )
    assert any(
        title.startswith("sequence 1, 8 tokens, on rank 2, micro-step 0, ") for title in found
    )
    assert sum("waits for keys" in title for title in found) == 1, "of sequence 4"
    phases = titles(drawn(panel(stages=2)))
    assert {"forward", "backward"} == {
        title.split(", ")[-2] for title in phases if "sequence 1," in title
    }


def test_ranks_beside_each_other_share_a_block() -> None:
    root = drawn(panel())
    assert [high for *_, high in of_kind(root, "s0")] == [25.0], "two rows of 13 but for a gap"
    assert sum("sequence 0," in title for title in titles(root)) == 1
    apart = batch_plan(np.array([100]), 3, [[Piece(0, (0, 2))]])
    assert sum("sequence 0," in title for title in titles(drawn(panel(apart)))) == 2


def test_the_longest_are_in_full_colours_and_waits_at_the_foot() -> None:
    root = drawn(panel())
    assert not set(of_kind(root, "s0")) & set(of_kind(root, "short"))
    assert len(of_kind(root, "short")) == len(titles(root)) - 1
    ((_, y, _, high),) = of_kind(root, "keys")
    (block,) = (box for box in of_kind(root, "short") if box[3] > 20)
    assert (high, y + high) == (3.0, pytest.approx(block[1] + block[3], abs=0.2))


def test_all_panels_have_one_axis() -> None:
    fast, slow = panel(), panel(name="slow", slower=4.0)
    idle = of_kind(drawn(fast, slow), "idle")
    assert len(idle) == 2 * 3
    assert {wide for _, _, wide, _ in idle[3:]} == {640.0}
    assert idle[0][2] == pytest.approx(160, rel=0.01)


def test_many_ranks_are_a_sample_from_first_to_last() -> None:
    assert drawn_ranks(5, 1) == [0, 1, 2, 3, 4]
    for num_ranks, stages in ((65, 1), (4096, 1), (100, 4), (7, 200)):
        ranks = drawn_ranks(num_ranks, stages)
        assert (ranks[0], ranks[-1]) == (0, num_ranks - 1)
        assert len(set(ranks)) == len(ranks) == max(2, 64 // stages)


def test_a_file_has_its_colours_inside_and_says_what_it_shows() -> None:
    inline = batch_svg([panel(name="<mine>")], "a & b")
    assert "var(" not in inline
    text = standalone(inline)
    assert "var(" not in text
    assert "prefers-color-scheme:dark" in text
    words = [element.text for element in ET.fromstring(text).iter(f"{SVG}text")]
    assert {"a & b", "<mine>", "7 %", "idle"} <= set(words)


def test_an_empty_plan_is_drawn_too() -> None:
    assert not titles(drawn(panel(batch_plan(np.array([0]), 2, []))))
