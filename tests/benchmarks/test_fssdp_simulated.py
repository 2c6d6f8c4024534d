"""The simulated cluster: its model of time against sums done by hand, its rows against the shares of training."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from benchmarks.fssdp import simulated
from benchmarks.fssdp.layer_time import (
    copies_seconds,
    exchange_seconds,
    matrix,
    micro_step_seconds,
    moving_seconds,
    routes_of,
    rows_PP,
    waited_seconds,
)
from benchmarks.fssdp.loads import drawn, drifting, zipf_shares
from benchmarks.fssdp.machines import (
    ACHIEVED_BYTES,
    ACHIEVED_FLOPS,
    CLUSTERS,
    DEEPSEEK_V3,
    GPT_MOE_L,
    LAYERS,
    Cluster,
    Layer,
)
from benchmarks.fssdp.picture import draw
from benchmarks.fssdp.simulated import (
    POLICIES,
    QUICK,
    Sizes,
    cases,
    planned_ahead,
    rows_of,
    simulate,
)
from moesys.plan.placement import Placement
from moesys.plan.replication import replicated
from moesys.plan.shares import Shares
from tests.plan.placements import random_loads, random_placement, seeds

CLUSTER = Cluster(
    name="two nodes of two",
    per_node=2,
    peak_flops=1000 / ACHIEVED_FLOPS,
    inside_bytes_per_s=100 / ACHIEVED_BYTES,
    uplinks=1,
    uplink_bytes_per_s=10 / ACHIEVED_BYTES,
)
LAYER = Layer(
    name="tiny",
    d_model=1,
    num_experts=4,
    top_k=1,
    expert_parameters=5,
    dense_parameters=10,
    score_width=2,
    seq_len=10,
    sequences=1,
    micro_steps=1,
)
SENT_PP = np.array([[3, 30, 2, 1], [1, 0, 0, 4], [5, 1, 9, 0], [0, 0, 50, 0]])
COPIED = Placement(owner_E=np.arange(4), copies_PC=np.array([[-1], [0], [0], [0]]))
"""Expert 0 on all ranks."""


def test_exchange_takes_as_long_as_its_busiest_link() -> None:
    """Inside, rank 2 gets 50 (100 bytes: a second); between, 7 of node 0 leave and 6 come (14 bytes: 1.4 s)."""
    assert exchange_seconds(CLUSTER, SENT_PP, 2) == pytest.approx(1.4)
    assert exchange_seconds(replace(CLUSTER, inside_bytes_per_s=12.5), SENT_PP, 2) == pytest.approx(
        10
    )
    assert exchange_seconds(CLUSTER, SENT_PP.T.copy(), 2) == pytest.approx(1.4)


def test_ranks_with_an_uplink_of_their_own() -> None:
    """Of half the rate: rank 2 sends 6, the most of any, and 7 of a whole node count no more."""
    two = replace(CLUSTER, uplinks=2, uplink_bytes_per_s=CLUSTER.uplink_bytes_per_s / 2)
    assert exchange_seconds(two, SENT_PP, 1) == pytest.approx(6 / 5)
    assert exchange_seconds(two, SENT_PP.T.copy(), 1) == pytest.approx(6 / 5), "or gets"


def test_micro_step_by_hand() -> None:
    """Rank 2 serves 61 rows of 10 operations, after 10 tokens of 2 * 10 + 10 * 2; a backward has twice of both."""
    multiplied = 3 * (400 + 610) / 1000
    assert micro_step_seconds(CLUSTER, LAYER, SENT_PP) == pytest.approx(multiplied + 4 * 1.4)


def test_copies_by_hand() -> None:
    """Once over an uplink of 10 bytes/s, 10 bytes: a second; then 0.1 s inside. Directly it were twice over the uplink."""
    there, home = copies_seconds(CLUSTER, LAYER, routes_of(COPIED, 2))
    assert there == pytest.approx(1 + 0.1)
    assert home == pytest.approx(2 * (1 + 0.1)), "gradients have 32 bits"


def test_attention_and_experts_hide_what_was_planned_ahead() -> None:
    """Their forwards take 0.4 s and 0.1 s, their backwards twice as long."""
    routes = routes_of(COPIED, 2)
    assert waited_seconds(CLUSTER, LAYER, routes, ahead=True) == pytest.approx(0.6 + 1.2)
    assert waited_seconds(CLUSTER, LAYER, routes, ahead=False) == pytest.approx(1.1 + 1.2)
    slow = replace(CLUSTER, peak_flops=CLUSTER.peak_flops / 10)
    assert waited_seconds(slow, LAYER, routes, ahead=True) == 0


def test_experts_that_stay_cost_nothing() -> None:
    """Two of 60 bytes change places, over an uplink each way; one inside a node takes a tenth."""
    before_E = np.array([0, 1, 2, 3])
    assert moving_seconds(CLUSTER, LAYER, before_E, before_E, 4) == 0
    assert moving_seconds(CLUSTER, LAYER, before_E, np.array([2, 1, 0, 3]), 4) == pytest.approx(6)
    assert moving_seconds(CLUSTER, LAYER, before_E, np.array([1, 0, 2, 3]), 4) == pytest.approx(0.6)


def test_a_way_counts_as_often_as_it_is_there() -> None:
    assert matrix([(0, 1), (1, 0), (0, 1)], 2).tolist() == [[0, 2], [1, 0]]
    assert matrix([], 2).tolist() == [[0, 0], [0, 0]]


@given(seeds())
def test_rows_are_those_that_training_sends(rng: np.random.Generator) -> None:
    per_node = int(rng.integers(1, 4))
    num_ranks, num_experts = per_node * int(rng.integers(1, 4)), int(rng.integers(1, 10))
    placement = random_placement(rng, num_experts, num_ranks, 2)
    shares = Shares.of(random_loads(rng, num_ranks, num_experts), placement, per_node)
    sent_PP = rows_PP(shares)
    for rank in range(num_ranks):
        assert sent_PP[rank].tolist() == shares.sent_P(rank).tolist()
    assert sent_PP.sum(0).tolist() == shares.loads_P().tolist()


def test_no_expert_has_more_than_a_token_can_send_it() -> None:
    shares_E = zipf_shares(256, 1.2, top_k=8)
    assert shares_E.sum() == pytest.approx(1)
    assert shares_E.max() == pytest.approx(1 / 8)
    assert (np.diff(shares_E) <= 1e-12).all()
    at_will_E = zipf_shares(256, 1.2)
    assert at_will_E[0] / at_will_E[9] == pytest.approx(10**1.2)
    free = shares_E < 0.1
    assert shares_E[free] / at_will_E[free] == pytest.approx(shares_E[-1] / at_will_E[-1])


def test_the_order_drifts_slowly() -> None:
    rng = np.random.default_rng(0)
    shares_SE = drifting(rng, 100, zipf_shares(64, 1.0))
    assert np.sort(shares_SE) == pytest.approx(np.tile(np.sort(shares_SE[0]), (100, 1)))
    changed_S = (np.diff(shares_SE, axis=0) != 0).any(1)
    assert 0.4 < changed_S.mean() < 0.95
    assert drawn(rng, shares_SE[0], 1600, 3).sum(1).tolist() == [1600] * 3


@pytest.mark.parametrize("policy", ["balanced", "hecate"])
def test_owners_stay_between_looks_and_moves_are_paid_for(policy: str) -> None:
    """Looks are at steps 5 and 30; other experts are hot from step 10 on, and drift."""
    ((case, _),) = cases(GPT_MOE_L, 0.6, replace(QUICK, ranks=(64,), num_layers=2))
    rng = np.random.default_rng(0)
    shares_WME = np.stack([drifting(rng, 40, zipf_shares(64, 0.6)) for _ in range(2)], axis=1)
    loads_WME = drawn(rng, shares_WME, 64 * case.slots)
    loads_WME[10:] = loads_WME[10:, :, ::-1]
    owners = {
        step: planned_ahead(case, policy, loads_WME[:step])[0].placement.owner_E
        for step in (29, 30, 39, 40)
    }
    assert (owners[30] == owners[39]).all()
    assert (owners[30] == owners[40]).all()
    assert (owners[29] != owners[30]).any()
    placed, _ = planned_ahead(case, policy, loads_WME)
    routes = routes_of(placed.placement, 8)
    for cluster in CLUSTERS:
        moved = moving_seconds(cluster, GPT_MOE_L, owners[29], owners[30], 64) / 25
        waited = waited_seconds(cluster, GPT_MOE_L, routes, ahead=True)
        assert moved > 0
        assert placed.waited[cluster.name] == pytest.approx(waited + moved)


def test_eplb_keeps_a_plan_and_shares_its_cost_out() -> None:
    """After its second plan, at step 30, loads do not matter; the experts that moved since the first are paid for in 25 steps."""
    ((case, _),) = cases(GPT_MOE_L, 1.0, replace(QUICK, ranks=(64,)))
    rng = np.random.default_rng(0)
    shares_WE = drifting(rng, 40, zipf_shares(64, 1.0))
    loads_WME = drawn(rng, shares_WE[:, None], 64 * case.slots)
    changed_WME = loads_WME.copy()
    changed_WME[30:] = changed_WME[30:, :, ::-1]
    for policy, is_kept in (("eplb", True), ("balanced", False)):
        (here,), (there,) = (planned_ahead(case, policy, of) for of in (loads_WME, changed_WME))
        same = here.placement.holders_EP() == there.placement.holders_EP()
        assert same.all() == is_kept, policy
    (second,) = planned_ahead(case, "eplb", loads_WME)
    first_E, second_E = (
        replicated(loads_WME[known - 5 : known, 0].mean(0), 64, 8, 2).owner_E for known in (5, 30)
    )
    assert second.placement.owner_E.tolist() == second_E.tolist()
    for cluster in CLUSTERS:
        moved = moving_seconds(cluster, GPT_MOE_L, first_E, second_E, 64)
        copies = waited_seconds(cluster, GPT_MOE_L, routes_of(second.placement, 8), ahead=True)
        assert moved > 0
        assert second.waited[cluster.name] == pytest.approx(copies + moved / 25)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return simulated.simulated_rows(quick=True, progress=lambda line: None)


def chosen(rows: Sequence[dict[str, Any]], **which: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in which.items())]


def test_the_same_rows_each_time(rows: list[dict[str, Any]]) -> None:
    assert rows == simulated.simulated_rows(quick=True, progress=lambda line: None)
    assert len(rows) == len(CLUSTERS) * len(LAYERS) * 2 * 2 * len(POLICIES)


def test_level_loads_give_copies_nothing_to_gain(rows: list[dict[str, Any]]) -> None:
    """What noise makes of equal shares can neither be predicted nor cost much, and nobody gains more than there is."""
    level = chosen(rows, zipf=0.0)
    noise = max(row["max_over_mean"] for row in chosen(level, policy="fixed"))
    assert noise < 1.25
    assert max(row["speedup"] for row in level) <= noise
    assert min(row["speedup"] for row in chosen(level, policy="balanced")) > 0.96


def test_skewed_loads_are_levelled(rows: list[dict[str, Any]]) -> None:
    for row in chosen(rows, zipf=1.0, policy="balanced"):
        (fixed,) = chosen(rows, **{**_place(row), "policy": "fixed"})
        assert (fixed["speedup"], fixed["copies_mib_per_rank"]) == (1, 0)
        assert row["max_over_mean"] < fixed["max_over_mean"] / 4
        assert row["speedup"] == pytest.approx(fixed["layer_ms"] / row["layer_ms"], abs=2e-3)
        assert row["speedup"] > 1.5
        assert 0 < row["copies_mib_per_rank"] <= 2 * 6 * _layer(row).expert_parameters / 2**20


def _place(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("cluster", "model", "ranks", "zipf")}


def _layer(row: dict[str, Any]) -> Layer:
    return next(layer for layer in LAYERS if layer.name == row["model"])


def test_groups_have_no_more_ranks_than_experts() -> None:
    sizes = Sizes()
    of_gpt = [(case.num_ranks, case.groups, jobs) for case, jobs in cases(GPT_MOE_L, 1.0, sizes)]
    assert of_gpt == [(64, 64, list(sizes.ranks))]
    of_deepseek = [
        (case.num_ranks, case.groups, jobs) for case, jobs in cases(DEEPSEEK_V3, 1.0, sizes)
    ]
    assert of_deepseek == [(64, 1, [64]), (128, 1, [128]), (256, 16, [256, 512, 1024, 2048, 4096])]


def test_the_slowest_group_sets_the_pace() -> None:
    """Without copies, of which more groups would change the plan."""
    sizes = replace(QUICK, ranks=(64, 512))
    ((case, jobs),) = cases(GPT_MOE_L, 0.6, sizes)
    found = simulate(case)
    few, many = (
        {(row["cluster"], row["policy"]): row for row in rows_of(case, job, found)} for job in jobs
    )
    for of, row in few.items():
        assert many[of]["layer_ms"] >= row["layer_ms"]
        assert many[of]["max_over_mean"] >= row["max_over_mean"]
    seconds_G = found["fixed"].seconds[CLUSTERS[0].name][0, 0]
    assert many[CLUSTERS[0].name, "fixed"]["layer_ms"] == round(1e3 * seconds_G.max(), 3)
    assert few[CLUSTERS[0].name, "fixed"]["layer_ms"] == round(1e3 * seconds_G[0], 3)


def test_picture_has_a_line_for_each_skew_in_each_panel(rows: list[dict[str, Any]]) -> None:
    root = ElementTree.fromstring(draw(rows))
    lines = [line for line in root.iter() if line.tag.endswith("polyline")]
    bold = [line for line in lines if line.get("class", "").startswith("line")]
    assert len(bold) == len(CLUSTERS) * len(LAYERS) * 2
    assert len(lines) == 3 * len(bold)
    points = [
        [tuple(map(float, p.split(","))) for p in line.get("points", "").split()] for line in bold
    ]
    assert {len(of_line) for of_line in points} == {2}
    shown = chosen(rows, cluster=CLUSTERS[0].name, model=GPT_MOE_L.name, policy="balanced")
    by_speedup = sorted(shown, key=lambda row: row["speedup"])
    heights = {at[1] for of_line in points[:2] for at in of_line}
    assert len(heights) == len({round(row["speedup"], 2) for row in by_speedup})
    assert points[0][0][1] > points[1][0][1], "more skew, more speedup, further up"
    texts = [text.text for text in root.iter() if text.tag.endswith("text")]
    assert {"Zipf 0", "Zipf 1", "balanced", "64", "GPT-MoE-L on p4d, A100"} <= set(texts)
