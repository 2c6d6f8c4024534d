"""Placements, loads and counts of any kind, for the planners' properties."""

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesys.plan.placement import Placement, placement_of


def random_owners(rng: np.random.Generator, num_experts: int, num_ranks: int) -> NDArray[np.int64]:
    """Any, also none of a rank's."""
    return rng.integers(0, num_ranks, num_experts)


def random_placement(
    rng: np.random.Generator, num_experts: int, num_ranks: int, most_copies: int
) -> Placement:
    """Of any owners."""
    return random_copies(rng, random_owners(rng, num_experts, num_ranks), num_ranks, most_copies)


def random_copies(
    rng: np.random.Generator, owner_E: NDArray[np.int64], num_ranks: int, most_copies: int
) -> Placement:
    """Each rank with 0 to `most_copies` copies of experts that it does not own."""
    copies_PC = np.full((num_ranks, most_copies), -1, dtype=np.int64)
    for rank in range(num_ranks):
        others = np.flatnonzero(owner_E != rank)
        number = int(rng.integers(0, min(most_copies, len(others)) + 1))
        copies_PC[rank, :number] = rng.permutation(others)[:number]
    return placement_of(owner_E, copies_PC)


def random_loads(rng: np.random.Generator, *shape: int) -> NDArray[np.int64]:
    """Of any skew; sometimes with nothing at all for some."""
    weights = rng.exponential(size=shape) ** rng.uniform(0, 3)
    return (weights * rng.integers(0, 2000, size=(*shape[:-1], 1))).astype(np.int64)


def seeds() -> st.SearchStrategy[np.random.Generator]:
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def layers_on_ranks() -> tuple[st.SearchStrategy, ...]:
    """A generator, each layer's number of experts, ranks, and those of a node."""
    experts_of_layers = st.lists(st.integers(1, 12), min_size=1, max_size=5)
    return seeds(), experts_of_layers, st.integers(1, 9), st.integers(1, 4)


def random_layer(
    rng: np.random.Generator, experts: int, ranks: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Loads of experts, and who owns them."""
    return random_loads(rng, experts).astype(float), random_owners(rng, experts, ranks)
