"""Which slots an expert keeps when it has more than its capacity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesys.moe.capacity import capacity_rows, within_capacity
from moesys.moe.routing import RoutingResult


def routed(ids, weights) -> RoutingResult:
    dummy = torch.zeros(len(ids), 1)
    return RoutingResult(
        topk_ids_TK=torch.tensor(ids),
        topk_weights_TK=torch.tensor(weights),
        logits_TE=dummy,
        probs_TE=dummy,
    )


def test_capacity_is_rounded_up_and_at_least_one():
    assert capacity_rows(100, 2, 8, 1.0) == 25
    assert capacity_rows(100, 2, 8, 1.01) == 26
    assert capacity_rows(1, 1, 64, 1.0) == 1


def test_the_lightest_slots_are_dropped():
    result = within_capacity(
        routed([[0, 1], [0, 1], [0, 2]], [[0.5, 0.3], [0.9, 0.3], [0.7, 0.1]]), 3, 2
    )
    assert result.topk_ids_TK.tolist() == [[-1, 1], [0, 1], [0, 2]]
    assert result.topk_weights_TK[0, 0] == 0
    assert result.topk_weights_TK[0, 1] == pytest.approx(0.3)


@given(
    st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 3)), min_size=1, max_size=40),
    st.integers(1, 6),
)
def test_every_expert_keeps_its_best(slots, capacity):
    ids, weights = [[i] for i, _ in slots], [[w / 4] for _, w in slots]
    kept = within_capacity(routed(ids, weights), 5, capacity).topk_ids_TK.flatten().tolist()
    for expert in range(5):
        own = [(w, -t) for t, (i, w) in enumerate(slots) if i == expert]
        best = sorted(own, reverse=True)[:capacity]
        assert sorted(-t for _, t in best) == [t for t, i in enumerate(kept) if i == expert]


def test_the_first_slots_are_kept_first_choices_before_second_ones():
    ids = [[0, 1], [1, 0], [0, 1], [1, 0]]
    weights = [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.4, 0.4]]
    kept = within_capacity(routed(ids, weights), 2, 3, "order")
    assert kept.topk_ids_TK.tolist() == [[0, 1], [1, 0], [0, -1], [1, -1]]
    kept = within_capacity(routed(ids, weights), 2, 1, "order")
    assert kept.topk_ids_TK.tolist() == [[0, -1], [1, -1], [-1, -1], [-1, -1]]


def test_random_slots_are_kept_each_as_often():
    """Random token selection (2109.10465): as many as fit, whatever their place and weight."""
    routing = routed([[0]] * 8, [[0.1 * t] for t in range(8)])
    torch.manual_seed(0)
    kept = torch.stack(
        [within_capacity(routing, 1, 2, "random").topk_ids_TK[:, 0] == 0 for _ in range(2000)]
    )
    assert kept.sum(1).tolist() == [2] * 2000
    torch.testing.assert_close(kept.float().mean(0), torch.full((8,), 0.25), rtol=0, atol=0.05)
