"""Joining and leaving a run."""

import pytest
import torch
import torch.distributed as dist

from moesys.parallel.bootstrap import process_group


def test_a_process_without_a_launcher_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group("cpu", 30.0) as process:
        assert (process.rank, process.world_size, process.backend) == (0, 1, "gloo")
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0]
    assert not dist.is_initialized()


def test_a_rank_without_a_gpu_is_refused_before_the_group_exists(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ValueError, match=r"set train\.device=cpu"), process_group("cuda", 30.0):
        pass
    assert not dist.is_initialized()
