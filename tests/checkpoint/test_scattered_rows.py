"""Tensors of which each rank has any rows: saved as the whole, loaded by any owners, bit for bit."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moesys.checkpoint.manifest import read_manifest
from moesys.checkpoint.shards import local_tensor
from moesys.checkpoint.store import load, save
from moesys.ops.shard import set_rows
from moesys.testing.ranks import run_ranks
from tests.checkpoint.test_store import random_bits, same_bits

SHAPE = (7, 2, 3)
OWNERS = ([0, 0, 0, 1, 2, 2, 3], [3, 0, 3, 0, 0, 3, 1], [2] * 7)
"""In order; scattered, where rank 2 has none; all on one rank."""


def whole() -> Tensor:
    return random_bits("float32", SHAPE, 5)


def of_owner(rank: int, owners: list[int]) -> DTensor:
    rows = [row for row, owner in enumerate(owners) if owner == rank]
    mesh = init_device_mesh("cpu", (4,))
    stride = whole().stride()
    tensor = DTensor.from_local(
        whole()[rows].clone(), mesh, [Shard(0)], run_check=False, shape=SHAPE, stride=stride
    )
    set_rows(tensor, rows)
    return tensor


def _saved_and_loaded(rank: int, size: int, folder: Path) -> list[bool]:
    for step, owners in enumerate(OWNERS):
        save(folder, step, {"experts": of_owner(rank, owners)}, {}, keep_last=9)
    right = []
    for step in range(len(OWNERS)):
        for owners in OWNERS:
            tensor = of_owner(rank, owners)
            local_tensor(tensor).zero_()
            load(folder / f"step_{step:08d}", {"experts": tensor})
            right.append(same_bits(local_tensor(tensor), local_tensor(of_owner(rank, owners))))
    return right


def test_any_owners_load_what_any_owners_saved(tmp_path: Path) -> None:
    assert all(all(right) for right in run_ranks(_saved_and_loaded, 4, tmp_path))
    for step, num_runs in enumerate((4, 6, 1)):
        manifest = read_manifest(tmp_path / f"step_{step:08d}")
        assert manifest.tensors["experts"].num_bytes == whole().nbytes
        assert len(manifest.tensors["experts"].chunks) == num_runs
    alone = torch.zeros(SHAPE)
    load(tmp_path / "step_00000001", {"experts": alone})
    assert same_bits(alone, whole())
