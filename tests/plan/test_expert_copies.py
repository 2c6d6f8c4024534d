"""What is planned for a run: of layers with different numbers of experts, never over its memory, owners only where they help."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.config.compose import compose
from moesys.config.placement_schema import PlacementConfig, PlacementPolicy
from moesys.plan.chunk_routes import chunk_route
from moesys.plan.copy_bytes import copy_in_rows
from moesys.plan.crossing import crossing_rows
from moesys.plan.expert_copies import (
    REPAIR_STEPS,
    WORTH,
    better_owners,
    planned_placements,
)
from moesys.plan.placement import Placement, even_owners, problems
from moesys.plan.placement_optimum import best_copies
from moesys.plan.repair import expected_loads
from moesys.plan.sharding import owned_at_most
from moesys.plan.shares import Shares
from tests.plan.placements import random_layer, random_loads, random_owners, seeds

BALANCED = PlacementConfig(policy="balanced")
POLICIES: tuple[PlacementPolicy, ...] = ("balanced", "hecate", "everywhere")


@pytest.mark.parametrize("policy", POLICIES)
@given(rng=seeds(), copies=st.integers(1, 3))
def test_memory_is_kept_to_and_layers_are_planned_one_by_one(
    policy: PlacementPolicy, rng: np.random.Generator, copies: int
) -> None:
    assert_planned_alike_alone(policy, rng, copies)
    assert_planned_alike_alone(policy, rng, copies, by_speed=True)


@pytest.mark.parametrize("seed", [8011, 8100, 8113])
def test_sums_over_all_layers_are_exact(seed: int) -> None:
    """Rounded ones planned these layers otherwise together than alone."""
    assert_planned_alike_alone("balanced", np.random.default_rng(seed), copies=2)
    assert_planned_alike_alone("balanced", np.random.default_rng(seed), copies=3)


def assert_planned_alike_alone(
    policy: PlacementPolicy, rng: np.random.Generator, copies: int, by_speed: bool = False
) -> None:
    ranks, per_node = (8, 2) if rng.integers(2) else (4, 4)
    numbers = rng.choice([4, 8, 16], size=int(rng.integers(1, 5))).tolist()
    loads_M = [random_loads(rng, number).astype(float) for number in numbers]
    owners_M = [random_owners(rng, number, ranks) for number in numbers]
    config = replace(BALANCED, policy=policy, copies=copies, overlap_degree=3)
    speeds_P = rng.choice([0.5, 0.9, 1.0, 1.2, 3.0], ranks) if by_speed else None
    budget = ranks, per_node, np.inf, speeds_P
    placements = planned_placements(config, loads_M, owners_M, *budget)
    for loads_E, owner_E, placement in zip(loads_M, owners_M, placements, strict=True):
        assert problems(placement, copies) == []
        assert np.array_equal(placement.owner_E, owner_E)
        (alone,) = planned_placements(config, [loads_E], [owner_E], *budget)
        assert np.array_equal(placement.copies_PC, alone.copies_PC)


def test_small_cases_are_near_the_best_that_there_is() -> None:
    """The highest load over the least that any copies allow, 1000 cases."""
    rng, worst = np.random.default_rng(5), 0.0
    for _ in range(1000):
        ranks, experts = int(rng.integers(2, 4)), int(rng.integers(2, 5))
        loads_E, copies = random_loads(rng, experts).astype(float), int(rng.integers(1, 3))
        owner_E = rng.permutation(np.arange(experts) % ranks)
        config = replace(BALANCED, copies=copies)
        (placement,) = planned_placements(config, [loads_E], [owner_E], ranks, 1)
        found = expected_loads(loads_E, placement)[1].max()
        best = best_copies(loads_E, owner_E, ranks, copies)
        worst = max(worst, float(found / best) if best else 1.0)
    assert worst <= 1.1


def test_owners_change_only_where_that_helps() -> None:
    config = replace(BALANCED, copies=1, overlap_degree=2)
    owners_M = [even_owners(16, 4)]
    level_M = [np.full(16, 100.0)]
    assert better_owners(config, level_M, owners_M, 4, 4) is None
    # One rank has the four hottest, of which copies relieve it only in part.
    skewed_M = [np.array([400.0] * 4 + [100.0] * 4 + [1.0] * 8)]
    found = better_owners(config, skewed_M, owners_M, 4, 4)
    assert found is not None
    assert np.bincount(found[0], minlength=4).max() == owned_at_most([16], 4)
    before, after = (
        expected_loads(skewed_M[0], planned_placements(config, skewed_M, owners, 4, 4)[0])[1].max()
        for owners in (owners_M, found)
    )
    assert after < (1 - WORTH) * before


def test_copies_near_the_rows_save_bytes() -> None:
    """What crosses between nodes, rows and copies together in bytes, is at most what it is without; with hot experts far less."""
    rng, per_copy, ratios = np.random.default_rng(2), 60.0, []
    for zipf in (0.0, 0.6, 1.2):
        counts_PE = rng.multinomial(
            2000, np.arange(1, 17) ** -zipf / sum(np.arange(1, 17) ** -zipf), size=8
        )
        owner_E, loads_E = even_owners(16, 8), counts_PE.sum(0).astype(float)
        crossing = []
        for rows_per_copy in (np.inf, per_copy):
            (placement,) = planned_placements(BALANCED, [loads_E], [owner_E], 8, 2, rows_per_copy)
            shares = Shares.of(counts_PE, placement, 2)
            route = chunk_route(placement, 2, "star")
            across = sum(route.crossing_chunks(node)[0] for node in range(4))
            crossing.append(shares.crossing_N2()[:, 0].sum() + per_copy * across)
            assert shares.loads_P().max() <= 1.1 * shares.loads_P().mean()
        ratios.append(crossing[1] / crossing[0])
    assert max(ratios) <= 1
    assert ratios[2] < 0.8


def test_what_a_copy_weighs_in_rows() -> None:
    """In fp32 a row goes four ways as D numbers, and of an expert 3 D F go there and back."""
    config = compose(["experiment=quickstart", "placement=balanced"])
    of = config.model.moe.d_expert
    assert copy_in_rows(config, 1) == 1.5 * of
    # A quarter of the bytes and a scale; recomputed rows travel twice as often forward.
    int8 = compose(["experiment=quickstart", "placement=balanced", "codec=int8"])
    d = config.model.d_model
    assert copy_in_rows(int8, 1) == 3 * d * of * 8 / (4 * (d + 4))
    again = compose(["experiment=quickstart", "placement=balanced", "train.recompute=layer"])
    assert copy_in_rows(again, 1) == of
    released = replace(config, placement=replace(config.placement, release=True))
    assert copy_in_rows(released, 3) == 3 * of * (6 + 3) / 4
    for words in (["codec=lsh"], ["codec=auto"], ["placement.near=false"]):
        off = compose(["experiment=quickstart", "placement=balanced", *words])
        assert copy_in_rows(off, 1) == np.inf


def test_rows_through_the_busiest_uplink_by_hand() -> None:
    """Three nodes of one rank; expert 0 of rank 0 with a copy on rank 1, expert 1 of rank 1, 2 of 2."""
    loads_E, owner_E = np.array([30.0, 12.0, 6.0]), np.arange(3)
    alone = Placement(owner_E=owner_E, copies_PC=np.full((3, 1), -1))
    # Rank 0 gets 10 + 10, the others send 10 and more.
    assert crossing_rows(loads_E, alone, loads_E, 1, 100.0) == pytest.approx(20)
    copied = Placement(owner_E=owner_E, copies_PC=np.array([[-1], [0], [-1]]))
    served_H = np.array([18.0, 12, 12, 6])
    # Rank 2 sends 10 and 4, rank 1 gets 2 and 8; a copy goes from rank 0 to rank 1.
    assert crossing_rows(loads_E, copied, served_H, 1, 0.0) == pytest.approx(14)
    assert crossing_rows(loads_E, copied, served_H, 1, 100.0) == pytest.approx(114)


def test_an_uplink_of_a_node_or_of_each_rank() -> None:
    """Two nodes of two ranks: expert 0 has all rows, and a copy on the other node, which serves what that sends."""
    loads_E, owner_E = np.array([40.0, 0, 0, 0]), np.arange(4)
    copied = Placement(owner_E=owner_E, copies_PC=np.array([[-1], [-1], [0], [-1]]))
    # The copy takes the whole of a rank's uplink, or half as long on that of both.
    found = crossing_rows(loads_E, copied, np.array([20.0, 20, 0, 0, 0]), 2, 10.0)
    assert found == pytest.approx((5 * 10) ** 0.5)
    alone = Placement(owner_E=owner_E, copies_PC=np.full((4, 1), -1))
    # 20 rows come to rank 0, or to its node.
    assert crossing_rows(loads_E, alone, loads_E, 2, 10.0) == pytest.approx((10 * 20) ** 0.5)


def test_copies_that_weigh_more_than_they_take_stay_on_their_nodes() -> None:
    loads_E, owner_E = np.array([300.0, 300, 50, 50, 50, 50, 0, 0]), even_owners(8, 4)
    for rows_per_copy, crosses in ((np.inf, True), (100.0, True), (250.0, False)):
        (placement,) = planned_placements(BALANCED, [loads_E], [owner_E], 4, 2, rows_per_copy)
        away, _ = chunk_route(placement, 2, "star").crossing_chunks(0)
        assert (away > 0) == crosses
        assert placement.copies(1)


def test_owners_change_so_that_copies_stay_on_their_nodes() -> None:
    """Both hot experts are of one node, the ranks of which can be level only with the other's help."""
    loads_M, owners_M = [np.array([300.0, 300, 50, 50, 50, 50, 0, 0])], [even_owners(8, 4)]
    (before,) = planned_placements(BALANCED, loads_M, owners_M, 4, 2, 100.0)
    assert chunk_route(before, 2, "star").crossing_chunks(0)[0]
    found = better_owners(BALANCED, loads_M, owners_M, 4, 2, 100.0)
    assert found is not None
    (after,) = planned_placements(BALANCED, loads_M, found, 4, 2, 100.0)
    assert chunk_route(after, 2, "star").crossing_chunks(0) == (0, 0)
    loads_P = expected_loads(loads_M[0], after)[1]
    assert loads_P.max() <= 1.05 * loads_P.mean()
    assert better_owners(BALANCED, loads_M, found, 4, 2, 100.0) is None


@pytest.mark.parametrize("steps", [REPAIR_STEPS, 0], ids=["repaired", "laid"])
def test_copies_are_planned_by_speed(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks with equal loads the slow one's experts are copied, and it gets no copy."""
    monkeypatch.setattr("moesys.plan.expert_copies.REPAIR_STEPS", steps)
    loads_E, owner_E = np.full(16, 100.0), even_owners(16, 8)
    speeds_P = np.where(np.arange(8) == 1, 0.5, 1.0)
    (even,) = planned_placements(BALANCED, [loads_E], [owner_E], 8, 8)
    assert (even.copies_PC < 0).all()
    (placement,) = planned_placements(BALANCED, [loads_E], [owner_E], 8, 8, math.inf, speeds_P)
    assert problems(placement, BALANCED.most_copies) == []
    assert (placement.copies_PC[1] < 0).all()
    assert {*placement.copies_PC[placement.copies_PC >= 0].tolist()} <= {2, 3}
    over_P = expected_loads(loads_E, placement, speeds_P=speeds_P)[1]
    assert over_P.max() <= 1.07 * loads_E.sum() / speeds_P.sum()


@settings(deadline=None, max_examples=200)
@given(seeds(), st.integers(1, 24), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_plans_by_speed_are_plans(rng, experts, nodes, per_node, copies):
    """And no worse by it than owners alone."""
    ranks = nodes * per_node
    loads_E, owner_E = random_layer(rng, experts, ranks)
    speeds_P = np.round(rng.uniform(0.25, 4, ranks), 2)
    config = replace(BALANCED, copies=copies)
    (placement,) = planned_placements(
        config, [loads_E], [owner_E], ranks, per_node, math.inf, speeds_P
    )
    assert problems(placement, copies) == []
    busiest = expected_loads(loads_E, placement, speeds_P=speeds_P)[1].max()
    assert busiest <= (np.bincount(owner_E, loads_E, ranks) / speeds_P).max() * (1 + 1e-9)
