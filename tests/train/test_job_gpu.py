"""The whole job on one GPU: NCCL, events, fused AdamW, the device's random state."""

import json

import pytest

from tests.train.launched import STEPS, overrides, records, run


@pytest.mark.gpu
def test_a_job_trains_on_a_gpu_and_goes_on(tiny_data, tmp_path):
    folder = tmp_path / "run"
    on_gpu = ["parallel.ep=1", "train.device=cuda", "train.dtype=bf16"]
    run(1, overrides(folder, tiny_data, *on_gpu, "train.steps=12"))
    run(1, overrides(folder, tiny_data, *on_gpu))
    first, second = records(folder, "start")
    assert first["device"] == "cuda:0"
    assert first["backend"] == "nccl"
    assert second["resumed_from_step"] == 12
    train = records(folder, "train")
    assert [r["step"] for r in train] == list(range(1, STEPS + 1))
    assert train[-1]["loss"] < train[0]["loss"]
    assert all(r["forward_ms"] > 0 and r["backward_ms"] > 0 for r in train)
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
