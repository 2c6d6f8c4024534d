"""The step benchmark: models of equal weights take equal steps, others are refused, rows have the form."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step
from benchmarks.results import Result, form_faults, write_result
from moesys.parallel.dims import ParallelDims
from moesys.parallel.mesh import build_meshes
from moesys.testing.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="transformers is the peer"
)

TINY = step._size("tiny", vocab=32, layers=2, d=128, e=4, k=2, f=16, batch=2, seq=8)


def compare(rank: int, size: int, sizes: list[step.Size]) -> Result:
    meshes = build_meshes(ParallelDims(world_size=1, ep=1), "cpu")
    return step.compare(sizes, meshes, budget_s=0.0, progress=print)


def parity_with(rank: int, size: int, change: str) -> str:
    """What the check says of a Qwen3-MoE whose weights or optimizer were changed."""
    from benchmarks.peers.transformers_model import TransformersModel

    meshes = build_meshes(ParallelDims(world_size=1, ep=1), "cpu")
    tiny = replace(TINY, model=replace(TINY.model, qk_norm=True))
    ours = step.OurModel(tiny, meshes)
    weights = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    peer: Any = TransformersModel(tiny.model, step.OPTIM, weights, "grouped_mm")
    with torch.no_grad():
        if change == "weights":
            peer.model.model.layers[1].mlp.gate.weight.mul_(-1.0)
        elif change == "optimizer":
            peer.optimizer.param_groups[0]["lr"] *= 10
    ids_BS = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    try:
        step.check_parity(ours, {"peer": peer}, ids_BS[:, :-1], ids_BS[:, 1:].contiguous())
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "equal"


def test_both_families_take_our_steps_and_rows_have_the_form(tmp_path: Path) -> None:
    result = run_ranks(compare, 1, [TINY])[0]
    assert [row["family"] for row in result.rows] == ["mixtral", "qwen3_moe"]
    for row in result.rows:
        assert row["parity_error"] < 1e-5
        assert row["ratio_to_best"] == min(row["eager_ratio"], row["grouped_mm_ratio"])
    assert result.headline["min_ratio_to_transformers"] == min(
        row["ratio_to_best"] for row in result.rows
    )
    path = write_result("step", result.headline, result.rows, "x", quick=True, folder=tmp_path)

    assert not form_faults(json.loads(path.read_text()))


@pytest.mark.parametrize("change", ["nothing", "weights", "optimizer"])
def test_a_peer_that_trains_otherwise_is_refused(change: str) -> None:
    answer = run_ranks(parity_with, 1, change)[0]
    if change == "nothing":
        assert answer == "equal"
    else:
        assert "peer computes something else" in answer
