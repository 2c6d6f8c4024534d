"""A network that fails between two machines: for seconds it is waited for, for longer the job starts again, exactly."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesys.checkpoint.folder import step_folders, step_of
from moesys.checkpoint.manifest import read_manifest
from moesys.launch.status import read_status
from moesys.train.exit_codes import DONE_EXIT_CODE, LOST_EXIT_CODE
from tests.launch.network import FIRST, Network, made
from tests.train.launched import finish, overrides, records, wait_for_step

STEPS = ("train.steps=60", "checkpoint.keep_last=3")


@pytest.fixture(scope="module")
def machines() -> Iterator[Network]:
    with made() as network:
        yield network


@pytest.fixture
def network(machines) -> Iterator[Network]:
    yield machines
    machines.end()


@pytest.fixture(scope="module")
def undisturbed(machines, tiny_data, tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    given = overrides(folder, tiny_data, *STEPS)
    for code, output in ends([machines.start_rank(rank, *given) for rank in (0, 1)]):
        assert code == DONE_EXIT_CODE, output
    return losses(folder)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder, "train")]


def ends(processes: list[subprocess.Popen[str]], timeout_s: float = 240) -> list[tuple[int, str]]:
    return [finish(process, timeout_s) for process in processes]


def cut_for(network: Network, seconds: float) -> None:
    network.cut()
    time.sleep(seconds)
    network.mend()


@pytest.mark.chaos
def test_a_cut_of_five_seconds_is_waited_for(network, undisturbed, tiny_data, tmp_path):
    folder = tmp_path / "run"
    ranks = [network.start_rank(rank, *overrides(folder, tiny_data, *STEPS)) for rank in (0, 1)]
    wait_for_step(ranks[0], folder, 4)
    cut_for(network, 5.0)
    for code, output in ends(ranks):
        assert code == DONE_EXIT_CODE, output
    assert len(records(folder, "start")) == 1
    assert max(r["step_ms"] for r in records(folder, "train")) > 3e3, "the cut missed the training"
    assert losses(folder) == undisturbed


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_cut_of_a_minute_is_named_and_the_run_starts_again(
    network, undisturbed, tiny_data, tmp_path
):
    folder = tmp_path / "run"
    agents = [agent(network, machine, folder, tiny_data) for machine in (0, 1)]
    wait_for_step(agents[0], folder, 12)
    cut_for(network, 60.0)
    outputs = []
    for code, output in ends(agents, timeout_s=600):
        assert code == DONE_EXIT_CODE, output
        outputs.append(output)
    for here, (output, other, machine) in enumerate(
        zip(outputs, (1, 0), ("machine-b", "machine-a"), strict=True)
    ):
        assert re.search(
            rf"^moesys: rank {other} is out of reach at step \d+: {machine} has answered nothing for 15 s: .* "
            rf"rank {here} leaves, exit code {LOST_EXIT_CODE}$",
            output,
            re.MULTILINE,
        ), output
    starts = records(folder, "start")
    assert len(starts) == 2
    assert starts[1]["resumed_from_step"] >= 10
    assert losses(folder) == undisturbed


def agent(network: Network, machine: int, folder: Path, data: Path) -> subprocess.Popen[str]:
    """torchrun of one rank on a machine, in a job of both."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    words += [f"--node-rank={machine}", f"--master-addr={FIRST}", "--master-port=29573"]
    words += ["--max-restarts=3", "-m", "moesys.train"]
    words += [*overrides(folder, data, *STEPS), "train.start_timeout_s=300"]
    return network.start(machine, *words)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_rank_0_that_is_cut_off_writes_nothing_once_the_other_side_has_begun(
    network, tiny_data, tmp_path
):
    """It wakes up while the other machine trains alone; a lock knows nothing of other machines."""
    folder = tmp_path / "run"
    given = [
        *overrides(folder, tiny_data, "train.elastic=true", "train.steps=4000"),
        "model.moe.router._target_=moesys.moe.routers.TopKRouter",
    ]
    former = [network.start_rank(rank, *given) for rank in (0, 1)]
    wait_for_step(former[0], folder, 12)
    network.cut()
    former[0].send_signal(signal.SIGSTOP)
    former[1].kill()
    former[1].communicate()
    (folder / ".lock").unlink()
    alone = network.start(1, sys.executable, "-m", "moesys.train", *given)
    while len(records(folder, "start")) < 2:
        assert alone.poll() is None, alone.communicate()[0]
        time.sleep(0.05)
    former[0].send_signal(signal.SIGCONT)
    code, output = finish(former[0])
    assert code == LOST_EXIT_CODE, output
    resumed = records(folder, "start")[1]["resumed_from_step"]
    assert resumed >= 10
    assert alone.poll() is None, "it did not outlive the other"
    wait_for_step(alone, folder, resumed + 12)
    alone.send_signal(signal.SIGTERM)
    finish(alone)
    assert [start["world_size"] for start in records(folder, "start")] == [2, 1]
    steps = [record["step"] for record in records(folder, "train")]
    assert steps == list(range(1, len(steps) + 1))
    # The former one's last words are in no file that the other reads.
    (stop,) = records(folder, "stop")
    assert stop["reason"] == "stopped"
    status = read_status(folder)
    assert status is not None
    assert status.state == "requeued"
    assert sorted(os.listdir(folder / "generations"))[-1] == "000002"
    for path in step_folders(folder / "checkpoints"):
        world_size = 1 if step_of(path) > resumed else 2
        assert read_manifest(path).world_size == world_size
