"""Training in which the hottest experts lie on several ranks: the numbers of plain expert parallelism, under every axis."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

import moesys.train.placements as placements_module
from moesys.config.dispatch_schema import DispatchConfig
from moesys.config.placement_schema import PlacementConfig, PlacementPolicy, RouteKind
from moesys.config.schema import Recompute, RunConfig
from moesys.moe.layer_placement import LayerPlacement
from moesys.plan.chunk_routes import ChunkRoute
from moesys.plan.costs import expert_parameters
from moesys.plan.expert_copies import planned_placements
from moesys.plan.links import Link, Links
from moesys.plan.load_prediction import prediction_errors
from moesys.plan.placement import Placement
from moesys.plan.speeds import LEAST_STEPS
from moesys.testing.parity import Difference, Numbers, compare, parity, train_small
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, with_micro_steps
from moesys.train.rank_speeds import RankSpeeds
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


def assert_same(ours: list[Numbers], theirs: Numbers) -> None:
    """But for the order of sums."""
    found = compare(ours, theirs)
    assert not found.missing
    assert found.are_counters_equal
    assert found.figures < 1e-6
    assert found.gradients < 1e-5


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
    assert_same(ranks, plain[0])
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


def _kinds(rank: int, size: int, run_config: RunConfig, *each: Links) -> list[set[RouteKind]]:
    """Of the routes of a step by each of the links, after one that knows no loads."""
    placements_module.measured_links = lambda *_: each[0]  # type: ignore[assignment]
    taken: list[ChunkRoute] = []
    take = LayerPlacement.take

    def kept(layer: LayerPlacement, placement: Placement, route: ChunkRoute, steps: int) -> None:
        taken.append(route)
        take(layer, placement, route, steps)

    LayerPlacement.take = kept  # type: ignore[method-assign]
    run = SmallRun(with_micro_steps(run_config, size, 1), size)
    run.step()
    found = []
    for links in each:
        run.train_step.placements._links = links
        taken.clear()
        run.step()
        found.append({route.kind for route in taken if route.stages})
    return found


def test_routes_are_the_fastest_by_the_links_as_measured() -> None:
    """A slow uplink is crossed once by a copy for two ranks; where stages cost more than bytes there is one."""
    placement = PlacementConfig(policy="hecate", overlap_degree=2)
    slow_uplinks = Links(inside=Link(0.0, 1e10), between=Link(0.0, 1e6))
    late = Links(inside=Link(1.0, 1e10), between=Link(1.0, 1e10))
    for kinds in run_ranks(_kinds, 4, spread(placement), slow_uplinks, late):
        assert kinds == [{"star"}, {"direct"}]
    fixed = replace(placement, route="relay")
    for kinds in run_ranks(_kinds, 4, spread(fixed), slow_uplinks):
        assert kinds == [{"relay"}]


def _measured(rank: int, size: int, run_config: RunConfig, step_s: float) -> Numbers:
    """With the first step's time ahead, and links and `step_s` made up."""
    placements_module.AHEAD_STEPS = 1  # type: ignore[misc]
    if step_s:
        made_up = Links(inside=Link(0.0, 1e10), between=Link(0.0, 1e6))
        placements_module.measured_links = lambda *_: made_up  # type: ignore[assignment]
        # Of the ranks' mean.
        LayerPlacement.taken_ahead_s = lambda _: [step_s * 2 * rank / 3, step_s * 2 * rank / 3]  # type: ignore[method-assign]
    return train_small(rank, size, run_config, 2)


@pytest.mark.parametrize("experts_in_time", [pytest.param(0, marks=pytest.mark.parity), 3.5])
def test_an_overlap_degree_that_is_measured_changes_no_number(
    experts_in_time: float, plain: list[Numbers]
) -> None:
    """And is that of the links and of the time that copies have: 3 in the time of three and a half, if these are made up."""
    run_config = spread(PlacementConfig(policy="hecate", overlap_degree=None))
    step_s = experts_in_time * 4 * expert_parameters(run_config.model) / 1e6
    ranks = run_ranks(_measured, 4, run_config, step_s)
    found = compare(ranks, plain[0])
    assert not found.missing
    assert found.figures < 1e-6
    assert found.gradients < 1e-5
    assert_copies_made(ranks, "hecate")
    for numbers in ranks:
        first, *others = (result.placement for result in numbers.results)
        assert first is not None
        assert first.overlap_degree is None
        degrees = {figures and figures.overlap_degree for figures in others}
        assert degrees == {3} if experts_in_time else degrees <= {*range(1, 9)}
        assert _placement_fields(numbers.results[1])["overlap_degree"] in degrees


SLOW_RANK, SLOWNESS = 2, 2


class Sped(NamedTuple):
    """A run of which a rank's experts had so many rows in each step."""

    numbers: Numbers
    rows: list[int]
    planned_by: list[list[float]]
    """Speeds, of each plan."""


def with_made_up_clock(slow_place: int) -> list[int]:
    """In this process a row takes 10 us, or `SLOWNESS` times as long on ranks of that place in a group. Returns rows, step by step."""
    rows_of_steps: list[int] = []
    taken = RankSpeeds.taken

    def made_up(speeds: RankSpeeds) -> tuple[int, int]:
        us, rows = taken(speeds)
        assert (us > 0) == (rows > 0)
        rows_of_steps.append(rows)
        return 10 * rows * (SLOWNESS if speeds._rank == slow_place else 1), rows

    RankSpeeds.taken = made_up  # type: ignore[method-assign]
    return rows_of_steps


def _sped(rank: int, size: int, run_config: RunConfig, slow_place: int) -> Sped:
    rows, planned_by = with_made_up_clock(slow_place), []

    def planned(*given) -> list[Placement]:
        if run_config.placement.policy != "everywhere":
            planned_by.append(given[-1].tolist())
        return planned_placements(*given)

    placements_module.planned_placements = planned  # type: ignore[assignment]
    return Sped(train_small(rank, size, run_config, 2), rows, planned_by)


def test_a_rank_that_is_half_as_fast_serves_about_half_the_rows() -> None:
    """From the step on in which enough is known; numbers are those of plain expert parallelism."""
    steps = LEAST_STEPS + 2
    plain = parity(spread(PlacementConfig(), steps=steps), 4, micro_steps=2)
    placement = replace(BALANCED, copies=6, spare=6, speeds="measured")
    ranks = run_ranks(_sped, 4, spread(placement, steps=steps), SLOW_RANK)
    assert_same([sped.numbers for sped in ranks], plain[0])
    rows_SP = np.array([sped.rows for sped in ranks]).T
    assert len({*rows_SP.sum(1).tolist()}) == 1
    of_others_S = rows_SP[:, SLOW_RANK] / np.delete(rows_SP, SLOW_RANK, 1).mean(1)
    assert of_others_S[1:LEAST_STEPS] == pytest.approx(1, abs=0.05)
    assert of_others_S[LEAST_STEPS:] == pytest.approx(1 / SLOWNESS, abs=0.05)
    for sped in ranks:
        of_steps = [_placement_fields(result) for result in sped.numbers.results]
        known = [1.14, 1.14, 0.57, 1.14]
        in_force = [*[[1.0] * 4] * LEAST_STEPS, *[known] * 2]
        assert [fields["rank_speeds"] for fields in of_steps] == in_force
        assert sped.planned_by == in_force[1:], "before the first step no loads are known"
        assert all(fields["rank_imbalance"] < 1.05 for fields in of_steps[1:])
    assert not any("rank_speeds" in _placement_fields(result) for result in plain[0].results)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("policy", "recompute", "degrees"),
    [
        ("balanced", "moe", {"etp": 2}),
        ("everywhere", "layer", {}),
        ("hecate", "none", {"pp": 2}),
        ("eplb", "none", {"tp": 2}),
    ],
    ids=["etp+moe", "edp+layer", "pp", "tp"],
)
def test_shares_by_speed_change_no_number_under_other_axes(
    policy: PlacementPolicy, recompute: Recompute, degrees: dict[str, int]
) -> None:
    degrees = {"ep": 2} | degrees
    steps = LEAST_STEPS + 1
    plain = parity(spread(PlacementConfig(), None, recompute, steps, **degrees), 4, micro_steps=2)
    placement = PlacementConfig(policy=policy, near=False, speeds="measured")
    ranks = run_ranks(_sped, 4, spread(placement, None, recompute, steps, **degrees), 1)
    for sped, theirs in zip(ranks, plain, strict=True):
        assert_same([sped.numbers], theirs)
        last = sped.numbers.results[-1].placement
        assert last is not None
        assert last.speeds_P == [1.33, 0.67]


POORLY_PLANNED = PlacementConfig(policy="hecate", copies=4, overlap_degree=1, calibrate=True)
"""One expert of each layer has copies, and there is room for more."""


def _calibrated(
    rank: int, size: int, run_config: RunConfig, bytes_per_s: float, micro_steps: int
) -> Numbers:
    """With links that are made up, and the time of rows."""
    made_up = Links(inside=Link(0.0, bytes_per_s), between=Link(0.0, bytes_per_s))
    placements_module.measured_links = lambda *_: made_up  # type: ignore[assignment]
    with_made_up_clock(slow_place=-1)
    return train_small(rank, size, run_config, micro_steps)


def test_copies_are_added_where_true_loads_want_them_and_change_no_number() -> None:
    """From the step on in which it is known how long rows take; none over links that are too slow."""
    steps = 4
    plain = parity(spread(PlacementConfig(), steps=steps), 4, micro_steps=1)
    run_config = spread(POORLY_PLANNED, steps=steps)
    level = {}
    for bytes_per_s in (1e12, 1.0):
        ranks = run_ranks(_calibrated, 4, run_config, bytes_per_s, 1)
        assert_same(ranks, plain[0])
        for numbers in ranks:
            of_steps = [_placement_fields(result) for result in numbers.results]
            added = [fields["added_copies"] for fields in of_steps]
            assert added[0] == 0
            assert all((number > 0) == (bytes_per_s > 1) for number in added[1:])
            level[bytes_per_s] = of_steps[-1]["rank_imbalance"]
    assert level[1e12] < 1.05 < level[1.0], level


@pytest.mark.parity
@pytest.mark.parametrize(
    ("recompute", "degrees"),
    [("moe", {"etp": 2}), ("layer", {}), ("none", {"pp": 2}), ("none", {"tp": 2})],
    ids=["etp+moe", "edp+layer", "pp", "tp"],
)
@pytest.mark.parametrize("release", [False, True], ids=["", "release"])
def test_added_copies_change_no_number_under_other_axes(
    recompute: Recompute, degrees: dict[str, int], release: bool
) -> None:
    degrees = {"ep": 2} | degrees
    plain = parity(spread(PlacementConfig(), None, recompute, **degrees), 4, micro_steps=2)
    placement = replace(POORLY_PLANNED, release=release)
    run_config = spread(placement, None, recompute, **degrees)
    ranks = run_ranks(_calibrated, 4, run_config, 1e12, 2)
    for ours, theirs in zip(ranks, plain, strict=True):
        assert_same([ours], theirs)
        last = ours.results[-1].placement
        assert last is not None
        assert last.added_copies


def _how_many_numbers(rank: int, size: int, *configs: RunConfig) -> list[int]:
    runs = [SmallRun(with_micro_steps(found, size, 2), size) for found in configs]
    return [len(run.train_step.placements.numbers()) for run in runs]


def test_a_step_has_as_many_numbers_more_as_docs_communication_says() -> None:
    """3 M + 7 of M layers, and 2 ep where experts are timed."""
    timed = replace(BALANCED, speeds="measured"), replace(BALANCED, calibrate=True)
    configs = [spread(placement) for placement in (PlacementConfig(), BALANCED, *timed)]
    few = 3 * len(configs[0].model.moe_layers) + 7
    assert run_ranks(_how_many_numbers, 4, *configs) == [[0, few, few + 8, few + 8]] * 4


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
    # A step has few rows: fewer than one copy on another node would be bytes.
    placement = replace(BALANCED, near=False, release=release)
    ranks = parity(spread(placement, None, recompute, **degrees), 4, micro_steps=2)
    assert_copies_made(ranks)
    for ours, theirs in zip(ranks, expected, strict=True):
        assert_same([ours], theirs)


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
