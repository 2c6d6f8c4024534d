"""Damage is always found, by all ranks together, and changes nothing."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash

from moesys.checkpoint.errors import CheckpointError
from moesys.checkpoint.manifest import read_manifest
from moesys.checkpoint.reshard import plan_reshard, reshard
from moesys.checkpoint.store import load, load_latest_good, save
from moesys.checkpoint.verify import verify
from moesys.testing.ranks import run_ranks
from tests import figures

BITS_PER_FILE = 40


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "a": torch.full((40, 5), value),
        "b": torch.full((7,), value).long(),
        "scalar": torch.tensor(value, dtype=torch.bfloat16),
    }


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return save(tmp_path, 1, tensors(3.0), {"tokens": 12}, keep_last=1).path


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def assert_found(step: Path, named: str) -> None:
    """Loading refuses, names the file, and leaves the tensors alone; verify says so too."""
    request = tensors()
    with pytest.raises(CheckpointError, match=named):
        load(step, request)
    assert all(not tensor.any() for tensor in request.values())
    assert verify(step)


@pytest.mark.parametrize("file", ["shard-00000.safetensors", "manifest.json", "manifest.xxh128"])
def test_every_single_flipped_bit_is_found(step: Path, file: str) -> None:
    rng = random.Random(0)
    path = step / file
    num_bits = path.stat().st_size * 8
    for bit in rng.sample(range(num_bits), BITS_PER_FILE):
        flip_bit(path, bit)
        assert_found(step, path.stem)
        flip_bit(path, bit)
    assert load(step, request := tensors()).state == {"tokens": 12}
    assert torch.equal(request["a"], tensors(3.0)["a"])
    assert not verify(step)


def test_1000_random_flips_in_all_files_are_found_and_none_is_loaded(tmp_path: Path) -> None:
    """Each time the step before is loaded instead, and says why."""
    save(tmp_path, 1, tensors(1.0), {}, keep_last=1)
    whole = save(tmp_path / "whole", 2, tensors(2.0), {"tokens": 12}, keep_last=1).path
    step = reshard(plan_reshard(whole, 3), tmp_path)
    files = sorted(step.iterdir())
    assert len(files) == 5
    sizes = [path.stat().st_size * 8 for path in files]
    rng = random.Random(1)
    for position in rng.sample(range(sum(sizes)), 1000):
        index, bit = 0, position
        while bit >= sizes[index]:
            index, bit = index + 1, bit - sizes[index]
        flip_bit(files[index], bit)
        loaded = load_latest_good(tmp_path, request := tensors())
        assert loaded is not None
        assert (loaded.step, request["a"][0, 0]) == (1, 1.0)
        assert files[index].stem in loaded.skipped[0].reason
        assert verify(step)
        flip_bit(files[index], bit)
        figures.count("bit_flips_found")
    assert verify(step) == []


def test_a_flipped_bit_names_file_and_tensor(step: Path) -> None:
    shard = step / "shard-00000.safetensors"
    header_bytes = int.from_bytes(shard.read_bytes()[:8], "little")
    header = json.loads(shard.read_bytes()[8 : 8 + header_bytes])
    start = 8 + header_bytes + header["b@0"]["data_offsets"][0]
    flip_bit(shard, 8 * start + 3)
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors: b at \[0\] is damaged"):
        load(step, tensors())
    (problem,) = verify(step)
    assert "b at [0] is damaged" in problem


def test_truncated_grown_and_missing_shards_are_found(step: Path) -> None:
    shard = step / "shard-00000.safetensors"
    content = shard.read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:size])
        assert_found(step, rf"shard-00000\.safetensors has {size} bytes instead of {len(content)}")
    shard.write_bytes(content + b"\0")
    assert_found(step, r"shard-00000\.safetensors has")
    shard.unlink()
    assert_found(step, r"shard-00000\.safetensors: No such file .*it holds a, b, scalar")


def test_missing_manifest_is_found(step: Path) -> None:
    for name in ("manifest.json", "manifest.xxh128"):
        content = (step / name).read_bytes()
        (step / name).unlink()
        assert_found(step, f"not a whole checkpoint: .*{name}")
        (step / name).write_bytes(content)


def forge(step: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest as somebody would who also renews its digest."""
    data = json.loads((step / "manifest.json").read_bytes())
    change(data)
    text = json.dumps(data).encode()
    (step / "manifest.json").write_bytes(text)
    digest = xxhash.xxh3_128_hexdigest(text)
    (step / "manifest.xxh128").write_text(f"{digest}  manifest.json\n")


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/hostname", "shard-00000.safetensors/../../x", ""]
)
def test_a_path_out_of_the_folder_is_refused(step: Path, name: str) -> None:
    def change(data: Any) -> None:
        data["files"] = {name: data["files"].popitem()[1]}
        for record in data["tensors"].values():
            for chunk in record["chunks"]:
                chunk["file"] = name

    forge(step, change)
    with pytest.raises(CheckpointError, match="is not of the form shard-NNNNN"):
        read_manifest(step)
    assert_found(step, "is refused")


def set_at(*keys: Any) -> Callable[[Any, Any], None]:
    def change(data: Any, value: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        (("version",), 2, "version 2, this program reads"),
        (("format",), "other", "'other'"),
        (("tensors", "a", "dtype"), "object", "object is none of"),
        (("tensors", "a", "shape"), [41, 5], "hold 200 of 205"),
        (("tensors", "a", "shape"), [-1, 5], "-1 is not a size"),
        (("tensors", "a", "chunks"), [], "hold 0 of 200"),
        (("tensors", "a", "chunks", 0, "offsets"), [1, 0], "reach outside"),
        (("tensors", "a", "chunks", 0, "file"), "shard-00009.safetensors", "not listed"),
        (("tensors", "a", "chunks", 0, "xxh3_128"), "00", "32 hex digits"),
        (("tensors", "a"), 3, "not a checkpoint manifest"),
        (("tensors",), None, "not a checkpoint manifest"),
        (("state",), [], "state is not a section"),
        (("step",), True, "True is not a size"),
    ],
)
def test_a_forged_manifest_is_refused(
    step: Path, where: tuple[Any, ...], value: Any, told: str
) -> None:
    forge(step, lambda data: set_at(*where)(data, value))
    assert_found(step, told)


def test_fallback_to_the_next_older_good_one(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path, number, tensors(float(number)), {"step": number}, keep_last=9)
    flip_bit(tmp_path / "step_00000003" / "manifest.json", 100)
    (tmp_path / "step_00000002" / "shard-00000.safetensors").unlink()
    request = tensors()
    loaded = load_latest_good(tmp_path, request)
    assert loaded is not None
    assert loaded.state == {"step": 1}
    assert request["a"][0, 0] == 1
    assert [bad.path.name for bad in loaded.skipped] == ["step_00000003", "step_00000002"]
    assert "manifest.json is damaged" in loaded.skipped[0].reason
    assert "No such file" in loaded.skipped[1].reason

    shutil.rmtree(tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match="no good checkpoint") as error:
        load_latest_good(tmp_path, request)
    assert "step_00000003" in str(error.value)
    assert "step_00000002" in str(error.value)


def fall_back_job(rank: int, world_size: int, directory: Path) -> tuple[int, str, bool]:
    """Rank 1 alone reads the damaged tensor."""
    for number in (1, 2):
        own = {f"stage{rank}": torch.full((4,), float(number))}
        save(directory, number, own, {}, keep_last=9)
    if rank == 0:
        record = read_manifest(directory / "step_00000002").tensors["stage1"]
        shard = directory / "step_00000002" / record.chunks[0].file
        flip_bit(shard, shard.stat().st_size * 8 - 5)
    dist.barrier()
    own = {f"stage{rank}": torch.zeros(4)}
    try:
        load(directory / "step_00000002", own)
        untouched = False
    except CheckpointError as error:
        untouched = "rank 1: " in str(error) and not own[f"stage{rank}"].any().item()
    loaded = load_latest_good(directory, own)
    assert loaded is not None
    assert own[f"stage{rank}"].tolist() == [1.0] * 4
    return loaded.step, loaded.skipped[0].reason, untouched


def test_one_bad_rank_makes_all_fall_back(tmp_path: Path) -> None:
    (first, second) = run_ranks(fall_back_job, 2, tmp_path)
    assert first == second
    step, reason, untouched = first
    assert step == 1
    assert untouched
    assert "rank 1: " in reason
    assert "stage1" in reason
