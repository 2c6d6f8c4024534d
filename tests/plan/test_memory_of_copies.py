"""Copies of experts in memory: by formula at most, and with release of two layers in the place of all."""

from dataclasses import replace

import numpy as np
import pytest

import moesys.train.placements as placements_module
from moesys.config.placement_schema import PlacementConfig
from moesys.config.schema import ComponentConfig, ParallelConfig, RunConfig
from moesys.plan.placement import Placement
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import with_micro_steps
from tests.plan.test_memory import WIDE, formula, peak, weigh

LEVEL = "moesys.moe.routers.RoundRobinRouter"
"""Copies then change no rank's rows."""
COPIES = 2
PLAIN = PlacementConfig()
PLACED = PlacementConfig(policy="balanced", copies=COPIES)
RELEASED = replace(PLACED, release=True)
DEEP = replace(
    WIDE,
    model=replace(
        WIDE.model,
        num_layers=7,
        vocab_size=64,
        moe=replace(WIDE.model.moe, d_expert=256, router=ComponentConfig(target=LEVEL)),
    ),
    parallel=ParallelConfig(ep=4),
)


def spread(placement: PlacementConfig, micro_steps: int) -> RunConfig:
    return with_micro_steps(replace(DEEP, placement=placement), 4, micro_steps)


def _peaks(rank: int, size: int, *configs: RunConfig) -> list[int]:
    """With as many copies as a rank may hold, those of the next rank's experts."""

    def full(config, loads_M, owners_M, num_ranks, *_) -> list[Placement]:
        found = []
        for owner_E in owners_M:
            next_ranks = [np.flatnonzero(owner_E == (r + 1) % num_ranks) for r in range(num_ranks)]
            found.append(Placement(owner_E=owner_E, copies_PC=np.stack(next_ranks)))
        return found

    placements_module.planned_placements = full  # type: ignore[assignment]
    return [peak(rank, size, config) for config in configs]


@pytest.mark.parity
@pytest.mark.parametrize(("micro_steps", "least_2"), [(1, (0.25, 0.05)), (3, (0.6, 0.6))])
def test_the_peak_grows_by_what_the_formula_says(
    micro_steps: int, least_2: tuple[float, float]
) -> None:
    """At most: in a single micro-step weights have gone from most layers when gradients come, and released ones from all when
    backward begins, where a rank holds most."""
    configs = [spread(placement, micro_steps) for placement in (PLAIN, PLACED, RELEASED)]
    for rank, (plain, *with_copies) in enumerate(run_ranks(_peaks, 4, *configs)):
        without = formula(configs[0], 4, rank)
        assert without.copies == 0
        for config, most, least in zip(configs[1:], with_copies, least_2, strict=True):
            expected = formula(config, 4, rank)
            assert expected.held - without.held == expected.copies
            assert least * expected.copies < most - plain <= expected.copies


@pytest.mark.parity
def test_experts_with_copies_are_whole_under_zero() -> None:
    config = replace(spread(PLACED, 2), parallel=ParallelConfig(ep=4, zero=3))
    for rank, weighed in enumerate(run_ranks(weigh, 4, config)):
        expected = formula(config, 4, rank)
        assert weighed == (expected.parameters, expected.gradients, expected.optimizer), rank
