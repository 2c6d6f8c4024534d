"""Owners such that nodes have equal loads: of every kind of expert, with level memory."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.plan.level_owners import FULL, level_owners
from moesys.plan.sharding import owned_at_most
from tests.plan.placements import layers_on_ranks, random_loads


def zipf(rng: np.random.Generator, experts: int, exponent: float) -> np.ndarray:
    return 1000.0 * rng.permutation(np.arange(1.0, experts + 1) ** -exponent)


@settings(deadline=None, max_examples=200)
@given(*layers_on_ranks(), st.booleans())
def test_every_expert_has_an_owner_and_no_rank_too_many(rng, sizes, ranks, per_node, some_near):
    loads = [random_loads(rng, n).astype(float) for n in sizes]
    near = [rng.random(n) < 0.4 for n in sizes] if some_near else None
    owners = level_owners(loads, ranks, per_node, near)
    assert [len(owner_E) for owner_E in owners] == sizes
    assert all(((owner_E >= 0) & (owner_E < ranks)).all() for owner_E in owners)
    owned_P = np.bincount(np.concatenate(owners), minlength=ranks)
    assert owned_P.max() <= owned_at_most(sizes, ranks)
    again = level_owners(loads, ranks, per_node, near)
    assert all((one == other).all() for one, other in zip(owners, again, strict=True))


def test_nodes_have_equal_loads_in_every_layer() -> None:
    """With as many experts on each, the node with the hottest alone would have up to 1.12 times the mean."""
    rng = np.random.default_rng(0)
    loads = [zipf(rng, 64, 0.6) for _ in range(8)]
    for loads_E, owner_E in zip(loads, level_owners(loads, 64, 8), strict=True):
        load_N = np.bincount(owner_E // 8, loads_E, 8)
        assert load_N.max() <= 1.07 * load_N.mean()


def test_an_expert_for_two_nodes_leaves_room_on_two() -> None:
    """Of four nodes of two ranks; the others' experts fill the other two, and are not in the way of its copies. Other layers
    use the places that this leaves free."""
    loads_E = np.array([2.0, *[0.25] * 8])
    assert loads_E[0] > FULL * loads_E.sum() / 4
    owner_E = level_owners([loads_E, *[np.full(9, 0.1)] * 3], 8, 2)[0]
    load_N = np.bincount(owner_E[1:] // 2, loads_E[1:], 4)
    assert np.sort(load_N).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert load_N[owner_E[0] // 2] == 0


def test_experts_of_all_nodes_are_owned_by_as_many_on_each() -> None:
    """Each sends its copies from its owner's uplink; also where a node has most of its places left, for it owns but one more."""
    loads_E = np.array([8.0, *[1.8] * 11, *[1.0] * 4])
    near_E = np.arange(16) >= 12
    layers, all_near = [loads_E, *[np.full(16, 0.1)] * 3], [near_E, *[np.zeros(16, dtype=bool)] * 3]
    owner_E = level_owners(layers, 8, 2, all_near)[0]
    assert (owner_E[1:12] // 2 != owner_E[0] // 2).all()
    assert np.bincount(owner_E[near_E] // 2, minlength=4).tolist() == [1, 1, 1, 1]
