"""Save and load: bitwise, on any number of ranks, into any layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from moesys.checkpoint.errors import CheckpointError, CheckpointMismatch
from moesys.checkpoint.manifest import read_manifest
from moesys.checkpoint.plan import ITEMSIZE_BYTES
from moesys.checkpoint.store import LoadedState, latest, load, load_latest_good, save
from moesys.testing.ranks import run_ranks


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bit pattern of the dtype: also NaN payloads, -0 and denormals."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    if torch_dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    num_bytes = torch.Size(shape).numel() * torch_dtype.itemsize
    raw = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return raw.view(torch_dtype).reshape(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    views = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*views)


SHAPES: dict[str, tuple[int, ...]] = {"scalar": (), "empty": (0, 3), "row": (5,), "cube": (3, 2, 7)}


def test_all_dtypes_and_shapes_come_back_bitwise(tmp_path: Path) -> None:
    tensors = {
        f"{dtype}.{kind}": random_bits(dtype, shape, seed)
        for seed, dtype in enumerate(ITEMSIZE_BYTES)
        for kind, shape in SHAPES.items()
    }
    tensors["strided"] = random_bits("float32", (6, 4), 99).t()[::2]
    state = {"tokens": 2**60, "loss": 0.1, "done": None, "list": [1, {"a": "ü"}]}
    result = save(tmp_path, 7, tensors, state, keep_last=1)
    assert result.path == tmp_path / "step_00000007"
    assert result.bytes == sum(file.stat().st_size for file in result.path.iterdir())

    out = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    out["strided"] = torch.zeros(12, 4).t()[::2, ::2]
    loaded = load(result.path, out)
    assert (loaded.step, loaded.state, loaded.rank_tensors) == (7, state, {})
    assert all(same_bits(out[name], tensors[name]) for name in tensors)


def expert_tensors(ep: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole tensors, and this rank's view of them with experts sharded over an ep axis of the world."""
    whole = {
        "dense": random_bits("bfloat16", (33, 8), 1),
        "norm": random_bits("float32", (8,), 2),
        "steps": random_bits("int64", (), 3),
        "experts": random_bits("float32", (8, 2, 3, 5), 4),
        "empty": torch.zeros(0, 4),
    }
    mine = {name: tensor.clone() for name, tensor in whole.items()}
    if dist.is_initialized():
        shape = (dist.get_world_size() // ep, ep)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))
        local = whole["experts"].chunk(ep)[mesh["ep"].get_local_rank()].clone()
        mine["experts"] = DTensor.from_local(local, mesh["ep"], [Shard(0)])
    return whole, mine


def save_job(rank: int, world_size: int, directory: Path, eps: list[int]) -> None:
    for ep in eps:
        _, mine = expert_tensors(ep)
        rng = {"rng": torch.full((3,), rank, dtype=torch.uint8)}
        save(directory, world_size * 10 + ep, mine, {"ep": ep}, rank_tensors=rng, keep_last=9)


def load_job(
    rank: int, world_size: int, directory: Path, eps: list[int], steps: list[int]
) -> dict[tuple[int, int], tuple[bool, int, Any]]:
    """(ep here, step) -> right, bytes read, own rank's tensor."""
    seen = {}
    for ep in eps:
        for step in steps:
            whole, mine = expert_tensors(ep)
            parts = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in mine.items()}
            for part in parts.values():
                part.zero_()
            loaded = load(directory / f"step_{step:08d}", mine)
            expected = whole | {"experts": whole["experts"].chunk(ep)[rank % ep]}
            right = all(same_bits(parts[name], expected[name]) for name in whole)
            rng = loaded.rank_tensors["rng"].tolist() if loaded.rank_tensors else None
            seen[ep, step] = (right, loaded.bytes_read, rng)
    return seen


LAYOUTS = {1: [1], 2: [1, 2], 4: [1, 2, 4]}
"""World size -> ep. One rank runs without a process group."""


def test_every_layout_loads_what_every_layout_saved(tmp_path: Path) -> None:
    save_job(0, 1, tmp_path, [1])
    for world_size in (2, 4):
        run_ranks(save_job, world_size, tmp_path, LAYOUTS[world_size])
    steps = [10 * world_size + ep for world_size, eps in LAYOUTS.items() for ep in eps]

    dense_bytes, expert_bytes, rng_bytes = 33 * 8 * 2 + 8 * 4 + 8, 8 * 2 * 3 * 5 * 4, 3
    for step in steps:
        manifest = read_manifest(tmp_path / f"step_{step:08d}")
        stored = dense_bytes + expert_bytes + manifest.world_size * rng_bytes
        # Replicas once in all, and every rank at work.
        assert sum(record.num_bytes for record in manifest.tensors.values()) == stored
        assert stored < sum(manifest.file_bytes.values()) < stored + 800 * manifest.world_size
        assert len(manifest.file_bytes) == manifest.world_size == step // 10

    seen_1 = [load_job(0, 1, tmp_path, [1], steps)]
    seen_2, seen_4 = (run_ranks(load_job, n, tmp_path, LAYOUTS[n], steps) for n in (2, 4))
    for world_size, seen_by_rank in ((1, seen_1), (2, seen_2), (4, seen_4)):
        for rank, seen in enumerate(seen_by_rank):
            assert seen.keys() == {(ep, step) for ep in LAYOUTS[world_size] for step in steps}
            for (ep, step), (right, bytes_read, rng) in seen.items():
                saved_world_size, saved_ep = divmod(step, 10)
                assert right, f"{saved_world_size=} {saved_ep=} {world_size=} {ep=} {rank=}"
                is_same_size = saved_world_size == world_size
                assert rng == ([rank] * 3 if is_same_size else None)
                # Chunks are read whole: the experts lie in saved_ep boxes.
                experts_read = int(expert_bytes * max(1 / ep, 1 / saved_ep))
                assert bytes_read == dense_bytes + experts_read + is_same_size * rng_bytes


def fsdp_tp_job(rank: int, world_size: int, directory: Path) -> dict[str, bool]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 10))
    reference = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    sharded = model.state_dict()
    path = save(directory, 1, sharded, {}, keep_last=1).path
    assert read_manifest(path).tensors["0.weight"].grid == (4, 1)
    assert read_manifest(path).tensors["1.weight"].grid == (2, 2)

    out = {name: torch.zeros_like(tensor) for name, tensor in reference.items()}
    load(path, out)
    plain = {name: same_bits(out[name], reference[name]) for name in reference}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load(path, model.state_dict())
    for name, tensor in model.state_dict().items():
        plain[f"{name} sharded"] = same_bits(tensor.full_tensor(), reference[name])

    stage = {f"stage{rank}": torch.full((2,), float(rank)), "shared": torch.ones(1)}
    path = save(directory, 2, stage, {}, keep_last=1).path
    back = {name: torch.zeros_like(tensor) for name, tensor in stage.items()}
    load(path, back)
    plain["stages"] = all(same_bits(back[name], stage[name]) for name in stage)

    strided = DTensor.from_local(
        torch.ones(2), mesh, [_StridedShard(0, split_factor=2), Replicate()]
    )
    pending = DTensor.from_local(torch.ones(2), mesh["dp"], [Partial()])
    with pytest.raises(CheckpointError) as error:
        save(directory, 3, {"strided": strided, "pending": pending}, {}, keep_last=1)
    plain["refused"] = "strided is placed" in str(error.value) and "pending is placed" in str(
        error.value
    )
    return plain


def test_fsdp_over_tp_with_uneven_shards_and_stages_with_names_of_their_own(
    tmp_path: Path,
) -> None:
    for results in run_ranks(fsdp_tp_job, 4, tmp_path):
        assert all(results.values()), results


def test_keep_last_and_saving_a_step_again(tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(4)}
    for step in (1, 2, 3):
        tensors["x"].fill_(step)
        save(tmp_path, step, tensors, {"step": step}, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    (tmp_path / "step_00000001.tmp-dead").mkdir()
    (tmp_path / "notes").mkdir()
    tensors["x"].fill_(33)
    save(tmp_path, 3, tensors, {"again": True}, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_00000002", "step_00000003"]
    loaded = load_latest_good(tmp_path, tensors)
    assert loaded is not None
    assert loaded.state == {"again": True}
    assert tensors["x"].tolist() == [33.0] * 4

    # Behind a later step, after a fall-back: the later one neither counts nor goes.
    save(tmp_path, 2, tensors, {}, keep_last=1)
    assert sorted(p.name for p in tmp_path.glob("step*")) == ["step_00000002", "step_00000003"]
    assert latest(tmp_path) == tmp_path / "step_00000003"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    assert load_latest_good(tmp_path / "absent", {}) is None


def test_a_step_retired_by_a_dead_save_counts_until_its_successor_is_there(tmp_path: Path) -> None:
    save(tmp_path, 5, {"x": torch.ones(1)}, {}, keep_last=1)
    retired = (tmp_path / "step_00000005").rename(tmp_path / "step_00000005.old-ab12")
    assert latest(tmp_path) == retired
    save(tmp_path, 5, {"x": torch.ones(1)}, {}, keep_last=1)
    assert latest(tmp_path) == tmp_path / "step_00000005"
    save(tmp_path, 6, {"x": torch.ones(1)}, {}, keep_last=2)
    assert not retired.exists()


def test_all_differences_are_told_at_once_and_nothing_changes(tmp_path: Path) -> None:
    saved = {
        "a": torch.ones(2),
        "b": torch.ones(3),
        "c": torch.ones(4),
        "only_saved": torch.ones(1),
    }
    path = save(tmp_path, 1, saved, {}, keep_last=1).path
    request = {
        "a": torch.zeros(2),
        "b": torch.zeros(3, 1),
        "c": torch.zeros(4, dtype=torch.bfloat16),
        "only_here": torch.zeros(1),
    }
    with pytest.raises(CheckpointMismatch) as error:
        load(path, request)
    for line in (
        "only_here is not in the checkpoint",
        "only_saved is only in the checkpoint",
        "b is float32 [3, 1] here, float32 [3] in the checkpoint",
        "c is bfloat16 [4] here, float32 [4] in the checkpoint",
    ):
        assert line in str(error.value)
    assert request["a"].tolist() == [0, 0]
    # Not a reason to fall back to an older one.
    with pytest.raises(CheckpointMismatch):
        load_latest_good(tmp_path, request)


def test_what_cannot_be_saved_is_told_at_once(tmp_path: Path) -> None:
    tensors = {"z": torch.zeros(1, dtype=torch.complex64), "rank_tensors/0/x": torch.zeros(1)}
    state: dict[str, Any] = {"ok": 1, "path": Path("x"), "ids": {3: "three"}}
    with pytest.raises(CheckpointError) as error:
        save(tmp_path / "new", 1, tensors, state, keep_last=0)
    for part in (
        "complex64",
        "begin with rank_tensors/",
        "state.path is a",
        "key 3",
        "keep_last=0",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "new").exists()


def test_only_json_and_safetensors_are_on_disk(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"x": torch.ones(1)}, {}, keep_last=1).path
    names = sorted(file.name for file in path.iterdir())
    assert names == ["manifest.json", "manifest.xxh128", "shard-00000.safetensors"]
    json.loads((path / "manifest.json").read_text())


def test_load_reports_where_it_came_from(tmp_path: Path) -> None:
    save(tmp_path, 3, {"x": torch.ones(1)}, {}, keep_last=1)
    loaded = load_latest_good(tmp_path, {"x": torch.zeros(1)})
    assert isinstance(loaded, LoadedState)
    assert (loaded.path, loaded.step, loaded.skipped) == (tmp_path / "step_00000003", 3, ())
