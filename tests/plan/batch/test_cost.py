"""Times of pieces and plans: counted pair by pair, and by hand.

Shapes: S sequences.
"""

import numpy as np
import pytest

from moesys.config.compose import compose
from moesys.plan.batch.cost import (
    AttentionKind,
    BatchCosts,
    costs_of,
    free_s,
    in_step_s,
    rank_seconds,
)
from moesys.plan.batch.plan import Piece, batch_plan
from moesys.plan.costs import training_flops_per_token


@pytest.mark.parametrize("window", [None, 1, 7, 64])
def test_attention_is_counted_pair_by_pair(window: int | None) -> None:
    lengths = np.array([0, 1, 6, 7, 8, 50])
    pairs = [sum(min(i + 1, window or n) for i in range(n)) for n in lengths.tolist()]
    assert AttentionKind(pair_s=2.0, window=window).seconds(lengths).tolist() == [
        2.0 * number for number in pairs
    ]


COSTS = BatchCosts(
    attention=(AttentionKind(pair_s=1.0),),
    token_s=10.0,
    piece_s=3.0,
    micro_step_s=5.0,
    block_token_s=4.0,
    hop_s=2.0,
)


def test_a_ring_waits_for_blocks_that_take_longer_than_the_work_beside() -> None:
    """8 tokens are 36 pairs. On two ranks a block of 4 tokens takes 18, and the work beside it a quarter of the pairs."""
    assert float(COSTS.rank_s(8, 1)) == 36 + 80 + 3
    assert float(COSTS.rank_s(8, 2)) == 18 + 40 + 3 + (18 - 9)
    # 100 tokens: a block of 50 takes 202, a quarter of 5050 pairs more.
    assert float(COSTS.rank_s(100, 2)) == 2525 + 500 + 3


def test_plans_by_hand() -> None:
    """Rank 1 is free after 18 + 5 and waits for rank 0 to begin its part of the ring."""
    plan = batch_plan(np.array([1, 2, 8]), 2, [[Piece(0, (1,)), Piece(1, (0,)), Piece(2, (0, 1))]])
    one, two, ring = 1 + 10 + 3, 3 + 20 + 3, 70
    assert rank_seconds(plan, COSTS).tolist() == [[5 + two + ring, 5 + one + ring]]
    assert free_s(plan, COSTS) == 5 + two + ring
    assert in_step_s(rank_seconds(plan, COSTS)) == 5 + two + ring
    apart = batch_plan(
        np.array([1, 2, 8]),
        2,
        [[Piece(0, (1,)), Piece(1, (0,))], [Piece(1, (1,)), Piece(0, (0,))]],
    )
    assert in_step_s(rank_seconds(apart, COSTS)) == 2 * (5 + two)
    assert free_s(apart, COSTS) == 2 * 5 + one + two


def test_costs_of_a_model_are_its_flops() -> None:
    """But for pairs that causal attention does not do, of which the formula of a step counts all."""
    model = compose(["experiment=quickstart"]).model
    costs, length = costs_of(model, 1.0), 4096
    all_pairs = training_flops_per_token(model, length) * length
    half = (all_pairs - training_flops_per_token(model, 0) * length) * (1 - 1 / length) / 2
    assert float(costs.work_s(length)) == pytest.approx(all_pairs - half, rel=1e-12)
