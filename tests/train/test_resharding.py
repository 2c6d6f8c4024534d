"""Experts that change their owners in training: no number is lost or changed, and a resume finds them again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moesys.train.placements as placements_module
from moesys.checkpoint.store import load, save
from moesys.config.placement_schema import PlacementConfig
from moesys.config.schema import RunConfig
from moesys.plan import expert_copies
from moesys.plan.links import Link, Links
from moesys.plan.placement import Integers
from moesys.testing.parity import Numbers, compare, parity, train_small, whole
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, with_micro_steps
from moesys.train import resharding
from moesys.train.state import run_tensors
from moesys.train.step import StepResult
from tests.plan.placements import random_copies, random_owners
from tests.train.test_placement import POORLY_PLANNED, SLOW_RANK, spread, with_made_up_clock

EVERY_STEP = PlacementConfig(policy="balanced", reshard_every_steps=1)


def _with_random_places(rank: int, size: int, run_config: RunConfig) -> Numbers:
    """Other owners and other copies before every step but the first."""
    rng = np.random.default_rng(7)

    def owners(config, loads_M, owners_M, num_ranks, *_) -> list[Integers]:
        return [random_owners(rng, len(owner_E), num_ranks) for owner_E in owners_M]

    def planned(config, loads_M, owners_M, num_ranks, *_):
        return [random_copies(rng, owner_E, num_ranks, 3) for owner_E in owners_M]

    placements_module.better_owners = owners  # type: ignore[assignment]
    placements_module.planned_placements = planned  # type: ignore[assignment]
    return train_small(rank, size, run_config, 2)


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.parity)])
def test_any_places_give_the_numbers_of_plain_expert_parallelism(steps: int) -> None:
    """Sums in another order differ in their last bits, which grow with the learning rate and the steps."""
    plain, placed = (
        replace(found, optim=replace(found.optim, lr=3e-4))
        for found in (spread(PlacementConfig(), steps=steps), spread(EVERY_STEP, steps=steps))
    )
    expected = parity(plain, 4, micro_steps=2)[0]
    ranks = run_ranks(_with_random_places, 4, placed, timeout_s=400.0)
    found = compare(ranks, expected)
    assert not found.missing
    assert found.are_counters_equal
    assert found.figures < 1e-6
    for step in range(steps):
        assert difference(ranks[0].gradients[step], expected.gradients[step]) < 1e-6
    first, *others = (result.placement for result in ranks[0].results)
    assert first is not None
    assert first.moved_experts == 0
    assert all(figures.moved_experts and figures.reshard_bytes for figures in others if figures)


def test_the_first_look_for_owners_is_before_the_second_step() -> None:
    """One that is due every third step, before steps 1, 4 and so on, knows no loads before the first."""
    placed = spread(PlacementConfig(policy="balanced", reshard_every_steps=3), steps=5)
    ranks = run_ranks(_with_random_places, 4, placed, timeout_s=400.0)
    moved = [result.placement.moved_experts > 0 for result in ranks[0].results if result.placement]
    assert moved == [False, True, False, True, False]


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of all parameters' gradients together, relative."""
    squared = sum((ours[name] - theirs[name]).double().square().sum() for name in theirs)
    norm = sum(gradient.double().square().sum() for gradient in theirs.values())
    return float(torch.as_tensor(squared / norm).sqrt())


def gathered(run: SmallRun) -> dict[str, Tensor]:
    """Parameters and optimizer states, whole."""
    return {name: whole(t) for name, t in run_tensors(run.model, run.optimizer).items()}


def _before_and_after(rank: int, size: int, degrees: dict[str, int]) -> list[dict[str, Tensor]]:
    run = SmallRun(with_micro_steps(spread(EVERY_STEP, **degrees), size, 2), size)
    run.step()
    found = [gathered(run)]
    rng = np.random.default_rng(0)
    placements = run.train_step.placements
    for _ in range(3):
        owners_M = [random_owners(rng, 8, run.dims.ep) for _ in range(3)]
        placements._reshard(owners_M)
        found.append(gathered(run))
    owned = [layer.experts.owned for layer in run.model.moe_layers()]  # type: ignore[union-attr]
    ep_rank = run.meshes.expert.get_local_rank("ep")
    assert owned == [tuple(np.flatnonzero(o == ep_rank)) for o in owners_M]  # pyright: ignore
    return found


@pytest.mark.parametrize(
    "degrees", [{}, pytest.param({"ep": 2, "etp": 2}, marks=pytest.mark.parity)], ids=["ep", "etp"]
)
def test_states_are_bitwise_what_they_were(degrees: dict[str, int]) -> None:
    for before, *others in run_ranks(_before_and_after, 4, degrees):
        assert any(".experts." in name and name.endswith("exp_avg") for name in before)
        for after in others:
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)


def _with_a_flipped_bit(rank: int, size: int) -> str:
    run = SmallRun(with_micro_steps(spread(EVERY_STEP), size, 2), size)
    run.step()
    exchanged = resharding._Move._exchanged

    def damaged(move: Any, send: Tensor) -> Tensor:
        received = exchanged(move, send)
        if rank == 2 and received.is_floating_point() and received.numel():
            received.view(torch.int32).view(-1)[0] ^= 1
        return received

    resharding._Move._exchanged = damaged  # type: ignore[method-assign]
    try:
        run.train_step.placements._reshard([np.arange(8) % 4] * 3)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_number_that_changed_on_its_way_ends_the_job_on_all_ranks() -> None:
    said = run_ranks(_with_a_flipped_bit, 4)
    assert all("gate_up of MoE layer 0: 1 rows arrived otherwise" in text for text in said)
    assert "expert 2 from rank 1 of the group" in said[2]
    assert "on other ranks" in said[0]


def _stopped_and_resumed(
    rank: int, size: int, folder: Path, planned: RunConfig, *after: RunConfig
) -> tuple[Numbers, list[Numbers]]:
    """The last steps of a run in one go, and of those that go on from its checkpoint."""
    expert_copies.WORTH = -1e9  # type: ignore[misc]
    placements_module.AHEAD_STEPS = 2  # type: ignore[misc]
    with_made_up_clock(SLOW_RANK)
    run_config = with_micro_steps(planned, size, 2)
    run = SmallRun(run_config, size)
    for _ in range(STOP):
        run.step()
    save(
        folder,
        STOP,
        run_tensors(run.model, run.optimizer),
        {"placement": run.train_step.placements.state},
        keep_last=1,
    )
    in_one_go = numbers(run)
    placements_module.measured_links = _not_again  # type: ignore[assignment]
    return in_one_go, [_resumed(folder, with_micro_steps(found, size, 2), size) for found in after]


def _stopped_and_resumed_with_fast_links(rank: int, *given: Any) -> tuple[Numbers, list[Numbers]]:
    fast = Link(0.0, 1e12)
    placements_module.measured_links = lambda *_: Links(fast, fast)  # type: ignore[assignment]
    return _stopped_and_resumed(rank, *given)


def _not_again(*_: object) -> None:
    raise AssertionError("by other links gradients may be summed in another order")


def _resumed(folder: Path, run_config: RunConfig, size: int) -> Numbers:
    run = SmallRun(run_config, size)
    loaded = load(folder / f"step_{STOP:08d}", run_tensors(run.model, run.optimizer))
    run.train_step.placements.at_resume(loaded.state["placement"])
    run.steps = STOP
    return numbers(run)


def numbers(run: SmallRun) -> Numbers:
    results = [run.step() for _ in range(3)]
    return Numbers(results=results, gradients=[], weights=gathered(run), buffers={})


PLANNED = PlacementConfig(
    policy="hecate", every_steps=2, reshard_every_steps=2, copies=1, overlap_degree=None
)
BY_SPEED = PlacementConfig(policy="balanced", every_steps=2, near=False, speeds="measured")
STOP = 3
"""In the middle between two plans, so that the one in force is made again."""


def test_a_resume_goes_on_bit_for_bit_or_without_copies(tmp_path: Path) -> None:
    planned = spread(PLANNED)
    after = (planned, spread(PlacementConfig()), spread(PlacementConfig(), ep=2))
    for in_one_go, (same, *without) in run_ranks(
        _stopped_and_resumed, 4, tmp_path, planned, *after
    ):
        first, second, _ = (result.placement for result in in_one_go.results)
        assert max(map(max, first.holders_ME)) > 1
        assert second.moved_experts > 0
        assert 1 <= second.overlap_degree <= 8
        assert [timeless(r) for r in same.results] == [timeless(r) for r in in_one_go.results]
        assert all(torch.equal(same.weights[name], t) for name, t in in_one_go.weights.items())
        for plain in without:
            for ours, theirs in zip(plain.results, in_one_go.results, strict=True):
                assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
                assert ours.expert_load_ME == theirs.expert_load_ME
                assert ours.placement is None


def test_a_resume_shares_rows_by_the_same_speeds(tmp_path: Path) -> None:
    """Which are known from the first step after it; the plan in force was made before they were."""
    planned = spread(BY_SPEED)
    for in_one_go, (same,) in run_ranks(_stopped_and_resumed, 4, tmp_path, planned, planned):
        first, second, _ = (result.placement for result in in_one_go.results)
        assert first.speeds_P == second.speeds_P == [1.14, 1.14, 0.57, 1.14]
        assert first.holders_ME != second.holders_ME
        assert [timeless(r) for r in same.results] == [timeless(r) for r in in_one_go.results]
        assert all(torch.equal(same.weights[name], t) for name, t in in_one_go.weights.items())


def test_a_resume_adds_the_same_copies(tmp_path: Path) -> None:
    """From its first step on, by times and links that the checkpoint has."""
    planned = spread(POORLY_PLANNED)
    ranks = run_ranks(_stopped_and_resumed_with_fast_links, 4, tmp_path, planned, planned)
    for in_one_go, (same,) in ranks:
        assert all(result.placement.added_copies for result in in_one_go.results)
        assert [timeless(r) for r in same.results] == [timeless(r) for r in in_one_go.results]
        assert all(torch.equal(same.weights[name], t) for name, t in in_one_go.weights.items())


def timeless(result: StepResult) -> StepResult:
    assert result.placement is not None
    return replace(result, exchange_ms=0.0, placement=replace(result.placement, wait_ms=0.0))
