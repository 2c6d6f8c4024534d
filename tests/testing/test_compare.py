"""What tells a layout's numbers from one process's sees every way in which they may differ."""

from dataclasses import replace

import pytest
import torch

from moesys.testing.parity import Numbers, compare
from moesys.train.step import StepResult

RESULT = StepResult(
    num_tokens=64,
    mean_length_tokens=16.0,
    loss=2.0,
    balance_loss=1.0,
    z_loss=0.5,
    mtp_loss=0.0,
    grad_norm=3.0,
    expert_load_ME=[[1, 2]],
    dropped_slots_M=[0],
    router_entropy_M=[0.0],
    sent_bytes=0,
    plain_bytes=0,
    between_nodes_bytes_N=[],
    coded_rows_M=[],
    exchange_ms=0.0,
    stop_requested=False,
    is_applied=True,
)
NUMBERS = Numbers(
    results=[RESULT],
    gradients=[{"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}],
    weights={"a": torch.ones(2), "b": torch.ones(1), "never read": torch.ones(1)},
    buffers={"bias": torch.zeros(2)},
)
NAN = float("nan")


def test_the_same_numbers_differ_by_nothing():
    assert compare([NUMBERS, NUMBERS], NUMBERS).worst == 0.0


def test_ranks_may_have_a_part_of_the_parameters_each():
    parts = [
        replace(NUMBERS, gradients=[{name: NUMBERS.gradients[0][name]}]) for name in ("a", "b")
    ]
    assert compare(parts, NUMBERS).worst == 0.0
    assert compare(parts[:1], NUMBERS).missing == {"b"}
    assert compare(parts[:1], NUMBERS).worst == float("inf")


@pytest.mark.parametrize(
    ("figure", "value", "worst"),
    [
        ("loss", 2.5, 0.25),
        ("grad_norm", 0.0, 1.0),
        ("balance_loss", NAN, float("inf")),
        ("z_loss", float("inf"), float("inf")),
        ("expert_load_ME", [[2, 1]], float("inf")),
    ],
)
def test_a_figure_of_one_rank_is_seen(figure, value, worst):
    other = replace(NUMBERS, results=[replace(RESULT, **{figure: value})])
    assert compare([NUMBERS, other], NUMBERS).worst == worst


@pytest.mark.parametrize(("value", "worst"), [(4.5, 0.1), (NAN, float("inf"))])
def test_a_gradient_of_one_rank_is_seen(value, worst):
    other = replace(NUMBERS, gradients=[{"a": torch.tensor([3.0, value])}])
    difference = compare([NUMBERS, other], NUMBERS)
    assert difference.worst == pytest.approx(worst)
    assert difference.gradient_name == "step 0: a"


def test_a_buffer_and_a_weight_are_seen():
    other = replace(NUMBERS, buffers={"bias": torch.tensor([0.0, 1e-9])})
    assert compare([NUMBERS, other], NUMBERS).worst == float("inf")
    other = replace(NUMBERS, weights=NUMBERS.weights | {"a": torch.tensor([NAN, 1.0])})
    assert compare([NUMBERS, other], NUMBERS).weights == float("inf")
