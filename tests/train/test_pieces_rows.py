"""Pieces of sequences with every way in which rows travel, and with copies of experts, where ranks have different numbers of
tokens and in some micro-steps none.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from moesys.config.dispatch_schema import DispatchConfig
from moesys.config.placement_schema import PlacementConfig
from moesys.config.schema import ComponentConfig, MoEConfig, ParallelConfig, Recompute, RunConfig
from moesys.testing.layouts import MAX_ERROR, MAX_WEIGHT_ERROR, MICRO_STEPS
from moesys.testing.parity import Numbers, compare, parity
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, sequences_of_step, with_micro_steps
from moesys.train.step import StepResult
from tests.train.coded import INT8, LSH, TREE
from tests.train.test_pieces import PIECES
from tests.train.test_placement import POORLY_PLANNED
from tests.train.test_placement import _calibrated as with_fast_links

BY_NODE = {
    name: DispatchConfig(exchange=name, ranks_per_node=2)
    for name in ("hierarchical", "deduplicated")
}
PADDED = replace(PIECES.model.moe, capacity_factor=8.0, capacity_policy="pad")
ROWS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "hierarchical": (4, {"ep": 4}, {"dispatch": BY_NODE["hierarchical"]}),
    "deduplicated": (4, {"ep": 4}, {"dispatch": BY_NODE["deduplicated"]}),
    "hierarchical, pp": (8, {"pp": 2, "ep": 4}, {"dispatch": BY_NODE["hierarchical"]}),
    "deduplicated, tp": (4, {"tp": 2, "ep": 4}, {"dispatch": BY_NODE["deduplicated"]}),
    "deduplicated, etp": (8, {"ep": 4, "etp": 2}, {"dispatch": BY_NODE["deduplicated"]}),
    "etp, tp": (4, {"tp": 2, "ep": 2, "etp": 2}, {}),
    "padded, hierarchical": (
        4,
        {"ep": 4},
        {"dispatch": BY_NODE["hierarchical"], "model": replace(PIECES.model, moe=PADDED)},
    ),
}
"""World size, degrees, what the configuration has beside."""
WIDTHS = replace(PIECES.model.moe, num_experts=12, expert_widths=(8, 24, 40))
PYRAMID = replace(PIECES.model.moe, num_experts=12, experts_by_layer=(4, 12, 8))
LATENT = replace(PIECES.model.moe, d_latent=12, shared_gate="softmax")


def recomputed(names: Iterable[str], always: tuple[str, Recompute]) -> list[Any]:
    """Each name with and without recomputation; all but one pair for `make parity`."""
    pairs = itertools.product(names, ("none", "layer"))
    return [p if p == always else pytest.param(*p, marks=pytest.mark.parity) for p in pairs]


@pytest.fixture(scope="module")
def one_process() -> Numbers:
    return parity(PIECES, 1, MICRO_STEPS)[0]


def assert_same(found: list[Numbers], reference: Numbers) -> None:
    difference = compare(found, reference)
    assert difference.worst < MAX_ERROR, difference
    assert difference.weights < MAX_WEIGHT_ERROR, difference


@pytest.mark.parametrize(
    ("name", "recompute"),
    recomputed(ROWS, ("deduplicated, tp", "layer")),
)
def test_rows_by_another_way(one_process: Numbers, name: str, recompute: Recompute) -> None:
    world_size, degrees, changes = ROWS[name]
    train = replace(PIECES.train, recompute=recompute)
    config = replace(PIECES, parallel=ParallelConfig(**degrees), train=train, **changes)
    assert_same(parity(config, world_size, MICRO_STEPS), one_process)


@pytest.mark.parametrize(
    "moe",
    [WIDTHS, PYRAMID, LATENT, replace(PADDED, num_experts=12, expert_widths=(8, 24, 40))],
    ids=["widths", "pyramid", "latent, weighed", "widths, padded"],
)
@pytest.mark.parametrize(
    "degrees", [{"ep": 4}, {"tp": 2, "ep": 2}, {}], ids=["ep", "tp+ep", "all on each"]
)
@pytest.mark.parity
def test_experts_of_other_kinds(moe: MoEConfig, degrees: dict[str, Any]) -> None:
    config = replace(PIECES, model=replace(PIECES.model, moe=moe))
    reference = parity(config, 1, MICRO_STEPS)[0]
    ranks = parity(replace(config, parallel=ParallelConfig(**degrees)), 4, MICRO_STEPS)
    assert_same(ranks, reference)


LOSSY: dict[str, dict[str, Any]] = {
    "int8": {"dispatch": DispatchConfig(wire=INT8)},
    "int8, deduplicated": {"dispatch": replace(BY_NODE["deduplicated"], wire=INT8)},
    "lsh": {"dispatch": DispatchConfig(codec=LSH)},
    "lsh, by error": {
        "dispatch": DispatchConfig(codec=ComponentConfig(target=LSH.target, options={}))
    },
    "tree, hierarchical": {"dispatch": replace(BY_NODE["hierarchical"], codec=TREE)},
    "tree, int8": {"dispatch": DispatchConfig(codec=TREE, wire=INT8)},
    **{
        f"drop by {priority}, {policy}": {
            "model": replace(
                PIECES.model,
                moe=replace(
                    PIECES.model.moe,
                    capacity_factor=0.4,
                    capacity_priority=priority,
                    capacity_policy=policy,
                ),
            )
        }
        for priority in ("weight", "order", "random")
        for policy in ("drop", "pad")
    },
}
"""What changes numbers, and by ranks' own tokens, so that other layouts have other ones."""


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        (name, degrees)
        if (name, degrees) == ("tree, hierarchical", {"ep": 4})
        else pytest.param(name, degrees, marks=pytest.mark.parity)
        for name in LOSSY
        for degrees in ({"ep": 4}, {"tp": 2, "ep": 4})
    ],
)
def test_rows_that_lose_something_lose_little(
    one_process: Numbers, name: str, degrees: dict[str, Any]
) -> None:
    config = replace(PIECES, parallel=ParallelConfig(**degrees), **LOSSY[name])
    for numbers in parity(config, 4, MICRO_STEPS):
        for step, (ours, theirs) in enumerate(
            zip(numbers.results, one_process.results, strict=True)
        ):
            assert ours.loss == pytest.approx(theirs.loss, rel=0.03)
            assert math.isfinite(ours.grad_norm)
            assert all(grad.isfinite().all() for grad in numbers.gradients[step].values())
            assert (sum(ours.dropped_slots_M) > 0) == ("drop" in name)
            assert ours.loss != theirs.loss


PLACED: dict[str, tuple[int, dict[str, Any], PlacementConfig]] = {
    "balanced": (4, {"ep": 4}, PlacementConfig(policy="balanced", near=False)),
    "hecate": (4, {"ep": 4}, PlacementConfig(policy="hecate")),
    "everywhere": (4, {"ep": 4}, PlacementConfig(policy="everywhere")),
    "eplb": (4, {"ep": 4}, PlacementConfig(policy="eplb")),
    "added": (4, {"ep": 4}, POORLY_PLANNED),
    "added, released": (4, {"ep": 2}, replace(POORLY_PLANNED, release=True)),
    "released, for two steps": (
        4,
        {"ep": 4},
        PlacementConfig(policy="balanced", near=False, release=True, every_steps=2),
    ),
    "pp": (8, {"pp": 2, "ep": 4}, PlacementConfig(policy="balanced", near=False)),
    "pp, released": (8, {"pp": 2, "ep": 2}, PlacementConfig(policy="hecate", release=True)),
    "tp": (4, {"tp": 2, "ep": 4}, POORLY_PLANNED),
    "etp": (4, {"etp": 2, "ep": 2}, PlacementConfig(policy="hecate")),
}
"""Where ranks have different numbers of tokens, and in some micro-steps none."""


@pytest.mark.parametrize(
    ("name", "recompute"),
    recomputed(PLACED, ("added", "none")),
)
def test_copies_of_experts(one_process: Numbers, name: str, recompute: Recompute) -> None:
    world_size, degrees, placement = PLACED[name]
    config = replace(
        PIECES,
        placement=placement,
        dispatch=DispatchConfig(ranks_per_node=2),
        parallel=ParallelConfig(**degrees),
        train=replace(PIECES.train, recompute=recompute),
    )
    found = run_ranks(with_fast_links, world_size, config, 1e12, MICRO_STEPS, timeout_s=240)
    difference = compare(found, one_process)
    assert difference.worst < MAX_ERROR, difference
    assert difference.weights < MAX_WEIGHT_ERROR, difference
    figures = [result.placement for result in found[0].results]
    assert all(of is not None and of.sent_bytes for of in figures[1:])
    assert any(of is not None and of.added_copies for of in figures) == placement.calibrate


@pytest.mark.parity
def test_copies_stay_through_what_fills_a_pipeline() -> None:
    """A plan of one micro-step, which two stages run with one of no sequence, sends as many copies as one of four."""
    everywhere = PlacementConfig(policy="everywhere")
    config = replace(PIECES, placement=everywhere, parallel=ParallelConfig(pp=2, ep=4))
    one, four = (parity(config, 8, micro_steps)[0].results for micro_steps in (1, 4))
    for ours, theirs in zip(one, four, strict=True):
        assert ours.placement is not None
        assert theirs.placement is not None
        assert ours.placement.sent_bytes == theirs.placement.sent_bytes


def _rehearsed(rank: int, size: int, config: RunConfig, times: int) -> list[StepResult]:
    run = SmallRun(with_micro_steps(config, size, MICRO_STEPS), size)
    for _ in range(times):
        run.train_step.rehearse(sequences_of_step(run.config, 9, run.meshes.dp_rank, run.dims.dp))
    results = [run.step() for _ in range(config.train.steps)]
    return [
        replace(result, exchange_ms=0.0, placement=replace(result.placement, wait_ms=0.0))
        for result in results
        if result.placement is not None
    ]


def test_a_rehearsal_leaves_no_trace() -> None:
    """In losses, loads, and figures of what travels."""
    config = replace(
        PIECES,
        placement=PlacementConfig(policy="hecate"),
        dispatch=DispatchConfig(codec=LSH),
        parallel=ParallelConfig(ep=2),
        train=replace(PIECES.train, steps=2),
    )
    assert run_ranks(_rehearsed, 2, config, 0) == run_ranks(_rehearsed, 2, config, 2)
