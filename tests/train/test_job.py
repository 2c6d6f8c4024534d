"""Ranks agree on one configuration, or say where they differ."""

from dataclasses import replace

from moesys.testing.ranks import run_ranks
from moesys.train.job import agree_on
from tests.train.test_parity import CONFIG


def _agree(rank: int, size: int, lr_of_last: float) -> str:
    lr = lr_of_last if rank == size - 1 else CONFIG.optim.lr
    try:
        agree_on(replace(CONFIG, optim=replace(CONFIG.optim, lr=lr)))
    except ValueError as error:
        return str(error)
    return "agreed"


def test_equal_configurations_agree():
    assert run_ranks(_agree, 3, CONFIG.optim.lr) == ["agreed"] * 3


def test_a_rank_with_another_configuration_names_the_lines():
    messages = run_ranks(_agree, 2, 0.125)
    assert messages[0] == "agreed"
    assert "rank 1 composed another configuration than rank 0" in messages[1]
    assert "rank 0:   lr: 0.003" in messages[1]
    assert "rank 1:   lr: 0.125" in messages[1]
