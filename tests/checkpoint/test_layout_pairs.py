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
from moesys.optim.build import build_optimizer
from moesys.parallel.dims import parallel_dims
from moesys.parallel.mesh import Meshes, build_meshes
from moesys.parallelize.build import ParallelModel, build_parallel_model
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.testing.parity import samples_of_step, whole
from moesys.testing.ranks import run_ranks
from moesys.train.state import run_tensors
from moesys.train.step import TrainStep
from moesys.train.timing import SectionTimer
from tests import figures
from tests.train.test_layouts import BASE, MICRO_STEPS

CPU = torch.device("cpu")
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
QUICK = ("tp", "zero+ep")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank had at the saved step, whole, and the losses after it."""

    tensors: dict[str, Tensor]
    losses: list[float]


class Training:
    """The small run of the parity tests under one layout, from any step on."""

    def __init__(self, config: RunConfig, meshes: Meshes) -> None:
        tokens = config.train.global_batch_tokens // (MICRO_STEPS * meshes.dims.dp)
        self.config = replace(config, train=replace(config.train, micro_batch_tokens=tokens))
        self.meshes = meshes
        self.parallel: ParallelModel = build_parallel_model(self.config, meshes, CPU)
        set_expert_backend(self.parallel.whole, "loop")
        self.optimizer = build_optimizer(self.parallel.whole, config.optim)
        self.step = TrainStep(self.parallel, self.optimizer, meshes, self.config, SectionTimer(CPU))

    def tensors(self) -> dict[str, Tensor]:
        return run_tensors(self.parallel.whole, self.optimizer)

    def losses(self, start: int, stop: int) -> list[float]:
        samples = self.meshes.dp_rank, self.meshes.dims.dp, MICRO_STEPS
        return [
            self.step(samples_of_step(self.config, s, *samples), self.config.optim.lr).loss
            for s in range(start, stop)
        ]

    def go_on(self) -> Seen:
        tensors = {name: whole(tensor) for name, tensor in self.tensors().items()}
        return Seen(tensors=tensors, losses=self.losses(SAVED_STEP, SAVED_STEP + MORE_STEPS))


def save_job(rank: int, world_size: int, parallel: ParallelConfig, directory: Path) -> Seen:
    meshes = build_meshes(parallel_dims(parallel, world_size), "cpu")
    training = Training(replace(BASE, parallel=parallel), meshes)
    training.losses(0, SAVED_STEP)
    save(directory, SAVED_STEP, training.tensors(), {}, keep_last=1)
    return training.go_on()


def load_job(
    rank: int, world_size: int, parallel: ParallelConfig, sources: dict[str, Path]
) -> dict[str, Seen]:
    meshes = build_meshes(parallel_dims(parallel, world_size), "cpu")
    # Other initial weights: nothing is right that was not loaded.
    config = replace(BASE, parallel=parallel, run=replace(BASE.run, seed=BASE.run.seed + 1))
    seen = {}
    for name, path in sources.items():
        training = Training(config, meshes)
        load(path, training.tensors())
        seen[name] = training.go_on()
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
