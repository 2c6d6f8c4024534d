"""All ranks take the backend whose slowest rank is fastest."""

from dataclasses import replace

import pytest
import torch

from moesys.parallel.dims import ParallelDims
from moesys.parallel.mesh import build_meshes
from moesys.parallelize import expert_backend
from moesys.profile.experts import BackendTimes, time_expert_backends
from moesys.testing.ranks import run_ranks
from tests.plan.test_costs import MODEL

TIMES_MS = [
    {"grouped_mm": 1.0, "loop": 3.0},
    {"grouped_mm": 9.0, "loop": 4.0},
]


def _choose(rank: int, size: int, times_ms: list, setting: str):
    expert_backend.time_expert_backends = lambda **_: BackendTimes(median_ms=times_ms[rank])
    meshes = build_meshes(ParallelDims(world_size=size, ep=size), "cpu")
    model = replace(MODEL, moe=replace(MODEL.moe, expert_backend=setting))
    return expert_backend.choose_expert_backend(
        model, meshes, micro_batch_tokens=64, dtype=torch.float32
    )


def test_ranks_agree_on_the_one_whose_slowest_rank_is_fastest():
    (backend, reason), other = run_ranks(_choose, 2, TIMES_MS, "auto")
    assert backend == other[0] == "loop"
    assert "grouped_mm 9.0 ms, loop 4.0 ms" in reason


def test_a_backend_that_some_rank_cannot_run_is_not_taken():
    times = [{"grouped_mm": 1.0, "loop": 5.0}, {"grouped_mm": None, "loop": 5.0}]
    assert [backend for backend, _ in run_ranks(_choose, 2, times, "auto")] == ["loop"] * 2


def test_a_setting_is_obeyed_without_timing():
    assert run_ranks(_choose, 1, [{}], "grouped_mm")[0][0] == "grouped_mm"


@pytest.mark.parametrize("num_rows", [5, 64])
def test_both_backends_are_timed(num_rows):
    times = time_expert_backends(
        num_rows=num_rows,
        num_experts=4,
        d_model=16,
        d_expert=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert all(ms is not None and ms > 0 for ms in times.median_ms.values())
