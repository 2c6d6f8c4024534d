"""What all layers' routers share is in a checkpoint once, and comes back under any layout.

The recurrent router's one unit: a copy on every pipeline stage, one parameter with one process.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesys.checkpoint.manifest import read_manifest
from moesys.checkpoint.store import load, save
from moesys.config.schema import ComponentConfig, ParallelConfig, RunConfig
from moesys.testing.layouts import BASE, MICRO_STEPS
from moesys.testing.parity import whole
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, with_micro_steps
from moesys.train.state import run_tensors

STEP = 3
LAYOUTS = {
    "one process": (1, ParallelConfig()),
    "pp": (2, ParallelConfig(pp=2)),
    "zbv": (2, ParallelConfig(pp=2, pp_schedule="zbv")),
    "pp+zero": (4, ParallelConfig(pp=2, zero=3)),
}
Numbers = tuple[dict[str, torch.Tensor], list[float]]


def configured(parallel: ParallelConfig, seed: int) -> RunConfig:
    target = "moesys.moe.routers.RecurrentRouter"
    router = ComponentConfig(target=target, options={"state_width": 6})
    model = replace(BASE.model, moe=replace(BASE.model.moe, router=router))
    return replace(BASE, model=model, parallel=parallel, run=replace(BASE.run, seed=seed))


def go_on(rank: int, world_size: int, parallel: ParallelConfig, folder: Path, step: int) -> Numbers:
    """Save after STEP steps into `folder`, or load from there; the state, whole, and the next losses."""
    config = with_micro_steps(configured(parallel, seed=step), world_size, MICRO_STEPS)
    run = SmallRun(config, world_size)
    tensors = run_tensors(run.model, run.optimizer)
    if step == 0:
        for _ in range(STEP):
            run.step()
        save(folder, STEP, run_tensors(run.model, run.optimizer), {}, keep_last=1)
        tensors = run_tensors(run.model, run.optimizer)
    else:
        load(folder / f"step_{STEP:08d}", tensors)
        run.steps = STEP
    return {n: whole(t) for n, t in tensors.items()}, [run.step().loss for _ in range(3)]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("pp", "one process"),
        *(
            pytest.param(a, b, marks=pytest.mark.parity)
            for a in LAYOUTS
            for b in LAYOUTS
            if a != b and (a, b) != ("pp", "one process")
        ),
    ],
)
def test_saved_in_one_layout_loaded_in_another(source: str, target: str, tmp_path: Path) -> None:
    saved = run_ranks(go_on, LAYOUTS[source][0], LAYOUTS[source][1], tmp_path, 0)
    loaded = run_ranks(go_on, LAYOUTS[target][0], LAYOUTS[target][1], tmp_path, 1)
    names = read_manifest(tmp_path / f"step_{STEP:08d}").tensors.keys()
    shared = {n for n in names if ".gru." in n or n.startswith("over_depth")}
    assert len([n for n in shared if n.startswith("model.over_depth.gru.")]) == 2
    assert not [n for n in shared if ".router.gru." in n]
    there = {name: tensor for tensors, _ in saved for name, tensor in tensors.items()}
    for tensors, losses in loaded:
        assert all(torch.equal(tensor, there[name]) for name, tensor in tensors.items())
        for ours, theirs in zip(losses, saved[0][1], strict=True):
            assert math.isclose(ours, theirs, rel_tol=1e-5)
    assert {n for tensors, _ in loaded for n in tensors} == set(names)
