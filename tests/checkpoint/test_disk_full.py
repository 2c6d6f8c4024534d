"""A disk that is really full: a small tmpfs."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moesys.checkpoint.errors import CheckpointError
from moesys.checkpoint.store import load, save
from moesys.testing.ranks import run_ranks


def mount(folder: Path, options: str) -> None:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "moesys-test", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    folder = tmp_path / "disk"
    mount(folder, request.param)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def save_twice(rank: int, world_size: int, directory: Path, numel: int) -> str:
    save(directory, 1, {"x": torch.ones(8)}, {}, keep_last=2)
    large = {f"x{i}": torch.ones(numel) for i in range(8)}
    with pytest.raises(CheckpointError) as error:
        save(directory, 2, large, {}, keep_last=2)
    assert [path.name for path in directory.iterdir()] == ["step_00000001"]
    load(directory / "step_00000001", {"x": torch.zeros(8)})
    return str(error.value)


@pytest.mark.parametrize("small_disk", ["size=1m"], indirect=True)
def test_what_does_not_fit_is_not_begun(small_disk: Path) -> None:
    first, second = run_ranks(save_twice, 2, small_disk, 100_000)
    assert first == second
    assert "No space left on device (nothing was begun)" in first
    # 8 tensors of 400,000 bytes and their entries.
    assert "It needs 3,208,192 bytes" in first
    assert "are free. Earlier checkpoints are untouched" in first


@pytest.mark.parametrize("small_disk", ["size=1m,nr_inodes=7"], indirect=True)
def test_a_disk_that_fills_up_while_writing(small_disk: Path) -> None:
    """Room for the bytes but not for the files: root, step 1 with its 4, the new folder, no shard."""
    first, second = run_ranks(save_twice, 2, small_disk, 10)
    assert first == second
    assert "shard-0000" in first
    assert "No space left on device" in first


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"cannot save step 1 in .*/file/checkpoints: .*Not a dir"
    ):
        save(tmp_path / "file" / "checkpoints", 1, {"x": torch.ones(1)}, {}, keep_last=1)
