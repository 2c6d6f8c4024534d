"""Times of pieces: counted pair by pair, and by hand."""

import numpy as np
import pytest

from moesys.config.compose import compose
from moesys.plan.batch.cost import AttentionKind, BatchCosts, costs_of
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
    """8 tokens are 36 pairs. On two ranks a block of 4 tokens takes 18, and the work beside it a quarter of the pairs and a start."""
    assert float(COSTS.rank_s(8, 1)) == 36 + 80 + 3
    assert float(COSTS.rank_s(8, 2)) == 18 + 40 + 2 * 3 + (18 - 9 - 3)
    # 100 tokens: a block of 50 takes 202, a quarter of 5050 pairs more.
    assert float(COSTS.rank_s(100, 2)) == 2525 + 500 + 2 * 3
    # Blocks without a token start nothing.
    assert float(COSTS.own_s(1, 4)) == 11 / 4 + 3


def test_costs_of_a_model_are_its_flops() -> None:
    """But for pairs that causal attention does not do, of which the formula of a step counts all."""
    model = compose(["experiment=quickstart"]).model
    costs, length = costs_of(model, 1.0), 4096
    all_pairs = training_flops_per_token(model, length) * length
    half = (all_pairs - training_flops_per_token(model, 0) * length) * (1 - 1 / length) / 2
    assert float(costs.work_s(length)) == pytest.approx(all_pairs - half, rel=1e-12)
