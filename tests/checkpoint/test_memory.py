"""Loading and saving stream: beside the model's own tensors there is never more than about one shard."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesys.checkpoint.manifest import read_manifest
from moesys.checkpoint.reshard import plan_reshard, reshard
from moesys.checkpoint.shards import local_tensor
from moesys.checkpoint.store import load, save
from moesys.testing.ranks import run_ranks

ROWS, NUM_TENSORS = 512, 3


class TemporaryBytes(TorchDispatchMode):
    """Counts the bytes of all tensor memory that operators make and that is alive, beside `own`."""

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.alive.values()))
        return result


def sharded(world_size: int, dim: int) -> dict[str, Tensor]:
    """Square matrices, cut along `dim` over all ranks."""
    mesh = init_device_mesh("cpu", (world_size,))
    shape = [ROWS, ROWS]
    shape[dim] //= world_size
    return {
        f"t{i}": DTensor.from_local(torch.randn(shape), mesh, [Shard(dim)])
        for i in range(NUM_TENSORS)
    }


def peak_of(action: Any, tensors: dict[str, Tensor]) -> int:
    with TemporaryBytes([local_tensor(tensor) for tensor in tensors.values()]) as seen:
        action()
    return seen.peak


def save_job(rank: int, world_size: int, directory: Path) -> int:
    tensors = sharded(world_size, 0)
    return peak_of(lambda: save(directory, 1, tensors, {}, keep_last=1), tensors)


def load_job(rank: int, world_size: int, path: Path) -> int:
    tensors = sharded(world_size, 1)
    return peak_of(lambda: load(path, tensors), tensors)


def test_a_load_under_another_layout_holds_one_chunk(tmp_path: Path) -> None:
    # What is contiguous on the CPU is written from where it is; the rest is messages between ranks.
    assert max(run_ranks(save_job, 4, tmp_path)) < 4096
    path = tmp_path / "step_00000001"
    manifest = read_manifest(path)
    largest_file = max(manifest.file_bytes.values())
    chunk_bytes = ROWS * ROWS // 4 * 4
    assert largest_file > NUM_TENSORS * chunk_bytes
    for peak in run_ranks(load_job, 2, path):
        # The rest is what a hash or a comparison needs.
        assert chunk_bytes <= peak < 1.01 * chunk_bytes
        assert peak <= 1.2 * largest_file


def test_files_of_one_chunk_are_the_hardest_case(tmp_path: Path) -> None:
    run_ranks(save_job, 4, tmp_path)
    source = tmp_path / "step_00000001"
    chunk_bytes = ROWS * ROWS // 4 * 4
    plan = plan_reshard(source, 4, max_file_bytes=chunk_bytes)
    peak = peak_of(lambda: reshard(plan, tmp_path / "new"), {})
    path = tmp_path / "new" / "step_00000001"
    largest_file = max(read_manifest(path).file_bytes.values())
    assert chunk_bytes < largest_file < 1.01 * chunk_bytes
    assert chunk_bytes <= peak <= 1.2 * largest_file
    for peak in run_ranks(load_job, 2, path):
        assert chunk_bytes <= peak <= 1.2 * largest_file
