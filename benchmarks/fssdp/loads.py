"""Loads of a layer's experts that might have been recorded, drawn. Deterministic, given a generator.

Shapes: S steps, E experts, P ranks.
"""

import numpy as np

from moesys.plan.placement import Amounts, Integers

CLUMP = 16
"""Slots that go to an expert together, for tokens of a text are alike: in the later halves of recorded runs, loads differ from one
step to the next by 6 to 18 times the variance that independent tokens would have."""
DRIFT = 0.02
"""Of all pairs that are next to each other in the order of loads, so many change places each step. With 16 experts and
Zipf's 0.6 an expert's load changes by a third of the mean in 50 steps, about as in recorded runs."""


def zipf_shares(num_experts: int, exponent: float, top_k: int = 1) -> Amounts:
    """[E], descending. A token goes to an expert once, so none has more than 1 / K of the slots; the others have the rest."""
    shares_E = np.arange(1, num_experts + 1) ** -float(exponent)
    shares_E /= shares_E.sum()
    while shares_E.max() > (1 + 1e-12) / top_k:
        is_full_E = shares_E >= (1 - 1e-12) / top_k
        left = 1 - is_full_E.sum() / top_k
        shares_E = np.where(is_full_E, 1 / top_k, shares_E * left / shares_E[~is_full_E].sum())
    return shares_E


def drifting(rng: np.random.Generator, steps: int, shares_E: Amounts) -> Amounts:
    """[S, E]: these shares in any order, which changes a little every step."""
    order_E = rng.permutation(len(shares_E))
    found_SE = np.empty((steps, len(shares_E)))
    for share_E in found_SE:
        share_E[order_E] = shares_E
        for place in np.flatnonzero(rng.random(len(shares_E) - 1) < DRIFT):
            order_E[[place, place + 1]] = order_E[[place + 1, place]]
    return found_SE


def moving_hotspot(
    rng: np.random.Generator, steps: int, num_experts: int, every_steps: int, times: float
) -> Amounts:
    """[S, E]: one expert has so many times the others' share, and every so many steps it is another one."""
    hot_S = rng.integers(0, num_experts, -(-steps // every_steps)).repeat(every_steps)[:steps]
    weights_SE = np.ones((steps, num_experts))
    weights_SE[np.arange(steps), hot_S] = times
    return weights_SE / weights_SE.sum(1, keepdims=True)


def linear_drift(
    rng: np.random.Generator, steps: int, shares_E: Amounts, lap_steps: int
) -> Amounts:
    """[S, E]: in a straight line from one order of these shares to another, and on to the next, `lap_steps` each."""
    laps = -(-steps // lap_steps)
    corners_XE = np.stack([rng.permutation(shares_E) for _ in range(laps + 1)])
    lap_S, way_S = np.divmod(np.arange(steps) / lap_steps, 1)
    lap_S = lap_S.astype(np.int64)
    way_S1 = way_S[:, None]
    return (1 - way_S1) * corners_XE[lap_S] + way_S1 * corners_XE[lap_S + 1]


def drawn(
    rng: np.random.Generator,
    shares_E: Amounts,
    slots: int,
    ranks: int | None = None,
    clump: int = CLUMP,
) -> Integers:
    """[.., E] as `shares_E`, or [P, E] of so many ranks: where so many slots go, `clump` at a time."""
    assert slots % clump == 0, slots
    return rng.multinomial(slots // clump, shares_E, ranks).astype(np.int64) * clump
