"""Training in which the hottest experts lie on several ranks: the numbers of plain expert parallelism, under every axis."""

from dataclasses import replace

import numpy as np
import pytest

from moesys.config.dispatch_schema import DispatchConfig
from moesys.config.placement_schema import PlacementConfig, PlacementPolicy
from moesys.config.schema import Recompute, RunConfig
from moesys.plan.load_prediction import prediction_errors
from moesys.testing.parity import Difference, Numbers, compare, parity
from moesys.train.record import _placement_fields
from tests.train.coded import INT8, LSH, config

BALANCED = PlacementConfig(policy="balanced")
STEPS = 3


def spread(
    placement: PlacementConfig,
    dispatch: DispatchConfig | None = None,
    recompute: Recompute = "none",
    steps: int = STEPS,
    **degrees: int,
) -> RunConfig:
    dispatch = dispatch or DispatchConfig(ranks_per_node=2)
    run_config = config(dispatch, recompute, **{"ep": 4} | degrees)
    return replace(run_config, placement=placement, train=replace(run_config.train, steps=steps))


def assert_copies_made(numbers: list[Numbers], policy: PlacementPolicy = "balanced") -> None:
    """In every step but a first that knows no loads; and they made ranks more level."""
    first, *others = (result.placement for result in numbers[0].results)
    assert first is not None
    if policy != "everywhere":
        assert first.sent_bytes == 0
        assert first.busiest_rank_M == first.busiest_owner_M
    for figures in others:
        assert figures is not None
        assert figures.sent_bytes > 0
        assert sum(figures.busiest_rank_M) < sum(figures.busiest_owner_M)
        if policy == "everywhere":
            assert not figures.prediction_error_M
        else:
            assert max(max(holders_E) for holders_E in figures.holders_ME) > 1
        if policy == "eplb":
            assert figures.moved_experts > 0


@pytest.fixture(scope="module")
def plain() -> list[Numbers]:
    return parity(spread(PlacementConfig()), 4, micro_steps=2)


@pytest.mark.parametrize(
    "policy",
    [
        "balanced",
        *(pytest.param(p, marks=pytest.mark.parity) for p in ("hecate", "everywhere", "eplb")),
    ],
)
def test_steps_are_those_of_plain_expert_parallelism(
    policy: PlacementPolicy, plain: list[Numbers]
) -> None:
    ranks = parity(spread(PlacementConfig(policy=policy)), 4, micro_steps=2)
    found = compare(ranks, plain[0])
    assert not found.missing
    assert found.are_counters_equal
    assert found.figures < 1e-6
    assert found.gradients < 1e-5
    assert_copies_made(ranks, policy)
    assert all(numbers.results[0].placement is None for numbers in plain)


def test_a_prediction_is_compared_with_the_loads_of_the_step_that_it_was_for() -> None:
    """With the loads of one step predicted from the last's; a plan made before step 3 is still in force in step 4."""
    placement = replace(BALANCED, predictor="last", every_steps=2)
    ranks = parity(spread(placement, steps=4, ep=2), 2, micro_steps=2)
    loads_SME = np.array([result.expert_load_ME for result in ranks[0].results])
    of_steps = [(1, 2), (2, 3), (2, 4)]
    expected = [prediction_errors(loads_SME[a - 1], loads_SME[b - 1]) for a, b in of_steps]
    assert len({error_M.tobytes() for error_M in expected}) == 3
    for numbers in ranks:
        first, *others = map(_placement_fields, numbers.results)
        assert not any(name.startswith("load_prediction_error") for name in first)
        for fields, error_M in zip(others, expected, strict=True):
            assert fields["load_prediction_error_by_layer"] == pytest.approx(error_M)
            assert fields["load_prediction_error"] == pytest.approx(error_M.mean())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("recompute", "degrees"),
    [
        ("moe", {}),
        ("layer", {}),
        ("none", {"tp": 2}),
        ("layer", {"cp": 2}),
        ("none", {"etp": 2, "ep": 2}),
        ("none", {"pp": 2, "ep": 2}),
        ("none", {"zero": 3}),
        ("none", {"ep": 2}),
    ],
    ids=["moe", "layer", "tp", "cp+layer", "etp", "pp", "zero 3", "edp"],
)
@pytest.mark.parametrize("release", [False, True], ids=["", "release"])
def test_other_axes_find_the_same(recompute, degrees: dict[str, int], release: bool) -> None:
    expected = parity(spread(PlacementConfig(), None, recompute, **degrees), 4, micro_steps=2)
    placement = replace(BALANCED, release=release)
    ranks = parity(spread(placement, None, recompute, **degrees), 4, micro_steps=2)
    assert_copies_made(ranks)
    for ours, theirs in zip(ranks, expected, strict=True):
        found = compare([ours], theirs)
        assert not found.missing
        assert found.are_counters_equal
        assert found.figures < 1e-6
        assert found.gradients < 1e-5


def with_copies(dispatch: DispatchConfig) -> Difference:
    """From plain expert parallelism."""
    expected = parity(spread(PlacementConfig(), dispatch), 4, micro_steps=2)
    ranks = parity(spread(BALANCED, dispatch), 4, micro_steps=2)
    assert_copies_made(ranks)
    found = compare(ranks, expected[0])
    assert not found.missing
    return found


@pytest.mark.parity
@pytest.mark.parametrize(
    "dispatch",
    [
        DispatchConfig(exchange="hierarchical", ranks_per_node=2),
        DispatchConfig(codec=LSH, ranks_per_node=2),
    ],
    ids=["hierarchical", "lsh"],
)
def test_ways_of_rows_find_the_same(dispatch: DispatchConfig) -> None:
    found = with_copies(dispatch)
    assert found.figures < 1e-6
    assert found.gradients < 1e-5


@pytest.mark.parity
def test_rows_in_few_bits_find_nearly_the_same() -> None:
    """A gradient's sum in another order turns the last bit of a weight, and that how some rows are rounded later."""
    wire = replace(INT8, stochastic_backward=False)
    dispatch = DispatchConfig(wire=wire, ranks_per_node=2)
    found = with_copies(dispatch)
    assert found.figures < 1e-3
    assert found.gradients < 0.02
