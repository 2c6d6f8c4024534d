"""Saved under one layout, loaded under another: every weight and optimizer tensor bitwise, the next losses too.

Two ordered pairs run with every test; all of them with `make parity`. A new layout is one line of LAYOUTS.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesys.checkpoint.manifest import read_manifest
from moesys.checkpoint.store import load, save
from moesys.config.schema import ParallelConfig, RunConfig
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.testing.layouts import BASE, MICRO_STEPS
from moesys.testing.parity import whole
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, with_micro_steps
from moesys.train.state import run_tensors
from tests import figures

SAVED_STEP, MORE_STEPS = 3, 5

LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "one process": (1, ParallelConfig()),
    "tp": (2, ParallelConfig(tp=2)),
    "zero+ep": (2, ParallelConfig(zero=3, ep=2)),
    "pp+cp": (4, ParallelConfig(pp=2, cp=2)),
    "tp+zero+etp": (4, ParallelConfig(tp=2, zero=2, etp=2)),
    "dualpipev+tp+ep": (4, ParallelConfig(pp=2, tp=2, ep=2, pp_schedule="dualpipev")),
    "pp+tp+ep+zero": (8, ParallelConfig(pp=2, tp=2, ep=2, zero=3)),
}
QUICK = ("zero+ep",)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank had at the saved step, whole, and the losses after it."""

    tensors: dict[str, Tensor]
    losses: list[float]


def start(config: RunConfig, world_size: int, meshes: Meshes | None = None) -> SmallRun:
    return SmallRun(with_micro_steps(config, world_size, MICRO_STEPS), world_size, meshes)


def tensors_of(run: SmallRun) -> dict[str, Tensor]:
    return run_tensors(run.model, run.optimizer)


def go_on(run: SmallRun) -> Seen:
    tensors = {name: whole(tensor) for name, tensor in tensors_of(run).items()}
    return Seen(tensors=tensors, losses=[run.step().loss for _ in range(MORE_STEPS)])


def save_job(rank: int, world_size: int, parallel: ParallelConfig, directory: Path) -> Seen:
    run = start(replace(BASE, parallel=parallel), world_size)
    for _ in range(SAVED_STEP):
        run.step()
    save(directory, SAVED_STEP, tensors_of(run), {}, keep_last=1)
    return go_on(run)


def load_job(
    rank: int, world_size: int, parallel: ParallelConfig, sources: dict[str, Path]
) -> dict[str, Seen]:
    meshes = build_meshes(parallel_dims(parallel, world_size), "cpu")
    # Other initial weights: nothing is right that was not loaded.
    config = replace(BASE, parallel=parallel, run=replace(BASE.run, seed=BASE.run.seed + 1))
    seen = {}
    for name, path in sources.items():
        run = start(config, world_size, meshes)
        load(path, tensors_of(run))
        run.steps = SAVED_STEP
        seen[name] = go_on(run)
    return seen


class Sources:
    """Each layout's checkpoint and what its ranks saw, made once when first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seen: dict[str, list[Seen]] = {}

    def path(self, name: str) -> Path:
        directory = self.directory / name
        if name not in self.seen:
            world_size, parallel = LAYOUTS[name]
            self.seen[name] = run_ranks(save_job, world_size, parallel, directory, timeout_s=250)
        return directory / f"step_{SAVED_STEP:08d}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("layouts"))


def merged(ranks: list[Seen]) -> dict[str, Tensor]:
    """The tensors of all ranks; those that several have are alike."""
    tensors: dict[str, Tensor] = {}
    for seen in ranks:
        for name, tensor in seen.tensors.items():
            assert torch.equal(tensors.setdefault(name, tensor), tensor), name
    return tensors


def assert_goes_on(sources: Sources, names: list[str], target: str) -> None:
    paths = {name: sources.path(name) for name in names if name != target}
    world_size, parallel = LAYOUTS[target]
    ranks = run_ranks(load_job, world_size, parallel, paths, timeout_s=250)
    for name, path in paths.items():
        there, here = merged(sources.seen[name]), merged([rank[name] for rank in ranks])
        assert there.keys() == here.keys() == read_manifest(path).tensors.keys()
        assert any(key.endswith("exp_avg_sq") for key in there)
        different = [key for key in there if not torch.equal(here[key], there[key])]
        assert not different, (name, target, different)
        losses = sources.seen[name][0].losses
        assert len(losses) == MORE_STEPS
        for rank in ranks:
            for ours, theirs in zip(rank[name].losses, losses, strict=True):
                assert math.isclose(ours, theirs, rel_tol=1e-5), (name, target, ours, theirs)


@pytest.mark.parametrize("target", QUICK)
def test_two_layouts_load_each_other(sources: Sources, target: str) -> None:
    assert_goes_on(sources, list(QUICK), target)


@pytest.mark.parity
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_loads_every_other(sources: Sources, target: str) -> None:
    assert_goes_on(sources, list(LAYOUTS), target)
    figures.count("layout_pairs_passed", len(LAYOUTS) - 1)


def test_there_are_24_ordered_pairs_over_1_to_8_ranks() -> None:
    assert len(LAYOUTS) * (len(LAYOUTS) - 1) >= 24
    assert {world_size for world_size, _ in LAYOUTS.values()} == {1, 2, 4, 8}
