"""kill -9 at any moment of a save: what counts as a checkpoint is whole, and the next save clears the rest."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from moesys.checkpoint.saver import Saver
from moesys.checkpoint.store import load, load_latest_good, save
from moesys.checkpoint.verify import verify
from tests import figures

KILLS = 15

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "torch.distributed.tensor"])


def tensors(value: int) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((4096,), float(value)) for i in range(20)}


def save_forever(directory: Path, mode: str, value: int, done: Connection) -> None:
    """Save and report value, value + 1, ...; as step 1 each time if mode is "again"."""
    torch.set_num_threads(1)
    while True:
        step = 1 if mode == "again" else value
        save(directory, step, tensors(value), {"value": value}, keep_last=2)
        done.send(value)
        value += 1


@pytest.mark.parametrize("mode", ["next", "again"])
def test_killed_at_random_moments(tmp_path: Path, mode: str) -> None:
    rng = random.Random(mode)
    value, kills_in_the_middle = 0, 0
    for _ in range(KILLS):
        receive, send = context.Pipe(duplex=False)
        saver = context.Process(target=save_forever, args=(tmp_path, mode, value + 1, send))
        saver.start()
        send.close()
        assert receive.recv() == value + 1
        time.sleep(rng.uniform(0, 0.04))
        saver.kill()
        saver.join()
        reported = value + 1
        while receive.poll():
            try:
                reported = receive.recv()
            except EOFError:
                break

        request = tensors(0)
        loaded = load_latest_good(tmp_path, request)
        assert loaded is not None
        assert loaded.skipped == ()
        value = loaded.state["value"]
        # What was reported as saved is there; the one under way may be.
        assert value in (reported, reported + 1)
        assert all((tensor == value).all() for tensor in request.values())
        for path in tmp_path.glob("step_????????"):
            assert verify(path) == []
        kills_in_the_middle += any(".tmp-" in path.name for path in tmp_path.iterdir())
    assert kills_in_the_middle > 0
    figures.count("save_kills_survived", KILLS)
    result = save(tmp_path, 10**6, {"x": torch.ones(1)}, {}, keep_last=1)
    assert list(tmp_path.iterdir()) == [result.path]
    load(result.path, {"x": torch.zeros(1)})


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def save_and_die(directory: Path, asynchronous: bool, point: int) -> None:
    """Save step 2 again, and be killed before the file system is asked for the `point`-th time."""
    torch.set_num_threads(1)
    saver = Saver(directory, keep_last=1, asynchronous=asynchronous)
    asked = 0

    def ask() -> None:
        nonlocal asked
        asked += 1
        if asked == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        # What is opened to be read, and a folder that is listed, changes nothing.
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if (event in CHANGES or opens) and str(directory) in str(arguments[0]):
            ask()

    def fsync(descriptor: int, real=os.fsync) -> None:
        ask()
        real(descriptor)

    sys.addaudithook(audit)
    os.fsync = fsync
    saver.begin(2, tensors(3), {"value": 3}, {})
    saver.wait()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_every_point_of_a_save(tmp_path: Path, asynchronous: bool) -> None:
    """Steps 1 and 2 are there; step 2 is saved again and step 1 goes: a name given, one taken, two folders removed."""
    before = tmp_path / "before"
    for step in (1, 2):
        save(before, step, tensors(step), {"value": step}, keep_last=2)
    values: list[int] = []
    exit_code = -signal.SIGKILL
    while exit_code == -signal.SIGKILL:
        directory = tmp_path / f"point{len(values)}"
        shutil.copytree(before, directory)
        saver = context.Process(
            target=save_and_die, args=(directory, asynchronous, len(values) + 1)
        )
        saver.start()
        saver.join()
        exit_code = saver.exitcode

        loaded = load_latest_good(directory, request := tensors(0))
        assert loaded is not None
        assert loaded.skipped == ()
        assert loaded.step == 2
        values.append(loaded.state["value"])
        assert all((tensor == values[-1]).all() for tensor in request.values())
    assert exit_code == 0
    # The old one until the new one has its name, never anything else.
    assert values == sorted(values)
    assert set(values) == {2, 3}
    num_points = len(values) - 1
    assert num_points >= 16
    figures.count("save_kills_survived", num_points)
