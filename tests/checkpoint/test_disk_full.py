"""A disk that is really full: a small tmpfs."""

import os
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moesys.checkpoint import save as saving
from moesys.checkpoint.errors import CheckpointError
from moesys.checkpoint.saver import Saver
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


# The disk is in order when a save begins, and is not when a later file is written.


@contextmanager
def full(disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    yield
    filler.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


@contextmanager
def quota(disk: Path) -> Iterator[None]:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, former[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


TROUBLES = {
    full: "No space left on device",
    read_only: "Read-only file system",
    quota: "File too large",
}
FILES = {"write_shards": "shard-0000", "write_manifest": "manifest."}


def save_through_trouble(rank: int, world_size: int, disk: Path, asynchronous: bool) -> list[str]:
    """Of each trouble before each file: what the save said. The one before and the one after are good."""
    directory = disk / "checkpoints"
    saver = Saver(directory, keep_last=2, asynchronous=asynchronous)
    steps = iter(range(1, 1000))

    def save_one() -> int:
        step = next(steps)
        state = {"x": torch.full((4096,), float(step)), "y": torch.full((4096,), float(step))}
        saver.begin(step, state, {"step": step}, {})
        saver.wait()
        return step

    def is_whole(step: int) -> bool:
        x = torch.zeros(4096)
        load(directory / f"step_{step:08d}", {"x": x, "y": torch.zeros(4096)})
        return bool((x == step).all())

    said = []
    for trouble in TROUBLES:
        for name in FILES:
            before = save_one()
            with pytest.MonkeyPatch.context() as patch, during(trouble, disk, rank) as begin:
                original: Callable[..., Any] = getattr(saving, name)

                def troubled(
                    *given: Any, original: Any = original, begin: Any = begin, **more: Any
                ) -> Any:
                    begin()
                    return original(*given, **more)

                patch.setattr(saving, name, troubled)
                with pytest.raises(CheckpointError) as error:
                    save_one()
            said.append(str(error.value))
            assert is_whole(before), "the earlier one is touched"
            assert is_whole(save_one()), "the next one is not as any"
    saver.close()
    return said


@contextmanager
def during(trouble: Any, disk: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Called on all ranks that write now: rank 0 makes the trouble, the others wait for it. Then it ends."""
    mark = disk.parent / f"{trouble.__name__}.mark"
    active = trouble(disk)

    def begin() -> None:
        if rank == 0:
            active.__enter__()
            mark.touch()
        while not mark.exists():
            time.sleep(0.01)

    yield begin
    if rank == 0:
        active.__exit__(None, None, None)
        mark.unlink()
    torch.distributed.barrier()


@pytest.mark.parametrize("small_disk", ["size=4m"], indirect=True)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_later_file_that_cannot_be_written(small_disk: Path, asynchronous: bool) -> None:
    first, second = run_ranks(save_through_trouble, 2, small_disk, asynchronous)
    assert first == second
    expected = [(reason, file) for reason in TROUBLES.values() for file in FILES.values()]
    assert len(first) == len(expected)
    for text, (reason, file) in zip(first, expected, strict=True):
        assert re.search(rf"cannot save step \d+ in {small_disk}/checkpoints: ", text), text
        assert re.search(rf"{reason}: '{small_disk}/checkpoints/step_\d+\.tmp-\w+/{file}", text), (
            text
        )
        assert re.search(
            r"It needs [\d,]+ bytes, [\d,]+ are free\. Earlier checkpoints are unt", text
        )
