"""Saves in the background: what is saved is what was there, and they fail on all ranks together."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesys.checkpoint.errors import CheckpointError
from moesys.checkpoint.manifest import read_manifest
from moesys.checkpoint.plan import ChunkWrite
from moesys.checkpoint.saver import Saver
from moesys.checkpoint.store import load, save
from moesys.testing.ranks import run_ranks
from tests.checkpoint.test_store import expert_tensors, same_bits


def files(step: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(step.iterdir())}


def both_ways(rank: int, world_size: int, directory: Path) -> None:
    _, tensors = expert_tensors(ep=2)
    rng = {"rng": torch.full((3,), rank, dtype=torch.uint8)}
    save(directory / "waited", 1, tensors, {"a": [1]}, rank_tensors=rng, keep_last=1)
    saver = Saver(directory / "background", keep_last=1, asynchronous=True)
    state = {"a": [1]}
    saver.begin(1, tensors, state, rng, before_commit=lambda: writer_is(rank == 0))
    # All of it may change at once.
    state["a"].append(2)
    for tensor in (*tensors.values(), *rng.values()):
        with torch.no_grad():
            tensor.zero_()
    saved = saver.wait()
    assert saved is not None
    assert saved.result.step == 1
    assert saver.poll() is None
    assert saver.wait() is None
    saver.close()


def writer_is(allowed: bool) -> None:
    """Rank 0 alone, outside of the training thread."""
    assert allowed
    assert threading.current_thread() is not threading.main_thread()


def test_the_same_bytes_are_written(tmp_path: Path) -> None:
    run_ranks(both_ways, 2, tmp_path)
    waited, background = (
        files(tmp_path / name / "step_00000001") for name in ("waited", "background")
    )
    assert len(waited) == 4
    assert waited == background


class Gate:
    """Holds a save just before its folder takes its name."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(30)


def gated(rank: int, world_size: int, directory: Path) -> None:
    saver = Saver(directory, keep_last=2, asynchronous=True)
    tensors = {"x": torch.ones(4)}
    for step in (1, 2):
        gate = Gate()
        saver.begin(step, tensors, {}, {}, before_commit=gate)
        # Rank 1 has nothing left to do, yet no rank sees an end before all do.
        assert rank or gate.reached.wait(30)
        assert saver.poll() is None
        # Only rank 0 knows that its gate is still shut.
        assert rank or not (directory / f"step_{step:08d}").exists()
        gate.open.set()
        while (saved := saver.poll()) is None:
            pass
        assert (directory / f"step_{step:08d}" / "manifest.json").exists()
        assert saved.result.step == step
    saver.close()


def test_poll_ends_on_all_ranks_together(tmp_path: Path) -> None:
    run_ranks(gated, 2, tmp_path)


def failing(rank: int, world_size: int, directory: Path) -> tuple[str, int]:
    """One rank cannot write its shard."""
    saver = Saver(directory, keep_last=2, asynchronous=True)
    tensors = {f"own{rank}": torch.ones(4)}
    saver.begin(1, tensors, {}, {})
    saver.wait()

    take = saver._host_copy.take

    def take_and_lose(*arguments: Any) -> Callable[[ChunkWrite], torch.Tensor]:
        chunk_of = take(*arguments)

        def lost(write: ChunkWrite) -> torch.Tensor:
            raise OSError(28, "No space left on device")

        return lost if rank == 1 else chunk_of

    saver._host_copy.take = take_and_lose
    saver.begin(2, tensors, {}, {})
    polls = 0
    while True:
        try:
            polls += 1
            assert saver.poll() is None
        except CheckpointError as error:
            message = str(error)
            break
    # The next one is as if nothing had been.
    saver._host_copy.take = take
    saver.begin(3, tensors, {}, {})
    saver.wait()
    saver.close()
    return message, polls


def test_a_failure_is_told_at_the_same_poll_of_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(failing, 2, tmp_path)
    assert first == second
    assert "cannot save step 2" in first[0]
    assert "rank 1: [Errno 28] No space left on device" in first[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_what_cannot_be_saved_is_told_before_the_copy(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1, asynchronous=True)
    with pytest.raises(CheckpointError, match="complex64"):
        saver.begin(1, {"x": torch.zeros(1, dtype=torch.complex64)}, {}, {})
    assert saver.wait() is None
    saver.close()


def test_close_waits_for_the_save_under_way(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1, asynchronous=True)
    gate = Gate()
    saver.begin(1, {"x": torch.ones(3)}, {}, {}, before_commit=gate)
    threading.Timer(0.2, gate.open.set).start()
    saver.close()
    load(tmp_path / "step_00000001", {"x": torch.zeros(3)})


def copy_bytes(rank: int, world_size: int, directory: Path) -> tuple[int, int, bool]:
    _, tensors = expert_tensors(ep=2)
    tensors["large"] = torch.ones(50_000)
    tensors["replica"] = torch.ones(50_000)
    saver = Saver(directory, keep_last=1, asynchronous=True)
    saver.reserve(tensors, {})
    buffer = saver._host_copy.buffer.data_ptr()
    for step in (1, 2):
        saver.begin(step, tensors, {}, {})
        saver.wait()
    is_reused = saver._host_copy.buffer.data_ptr() == buffer
    plan = saver._former.plan  # pyright: ignore[reportOptionalMemberAccess]
    num_chunks = len(plan.writes[rank])
    saver.close()
    return (
        saver._host_copy.buffer.nbytes - 64 * num_chunks,
        plan.bytes_of_rank[rank],
        is_reused,
    )


def test_the_copy_is_the_ranks_own_share_and_its_memory_is_used_again(tmp_path: Path) -> None:
    results = run_ranks(copy_bytes, 2, tmp_path)
    for copied, share, is_reused in results:
        assert copied <= share
        assert is_reused
    # Of replicas each rank keeps half.
    assert all(share < 1.2 * 50_000 * 4 for _, share, _ in results)


def test_a_change_of_what_is_saved_is_seen(tmp_path: Path) -> None:
    """The plan is kept from save to save, as long as the tensors stay the same."""
    saver = Saver(tmp_path, keep_last=9, asynchronous=True)
    for step, tensors in enumerate(
        ({"x": torch.ones(3)}, {"x": torch.ones(5)}, {"x": torch.ones(5), "y": torch.ones(1)})
    ):
        saver.begin(step, tensors, {}, {})
        saver.wait()
        path = tmp_path / f"step_{step:08d}"
        out = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        load(path, out)
        assert all(same_bits(out[name], tensors[name]) for name in tensors)
        assert read_manifest(path).step == step
        shutil.rmtree(path)
    saver.close()
