"""Machines that are lost and come back: two agents of torchrun with two ranks each, one of them killed with its ranks."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from moesys.checkpoint.folder import step_folders
from moesys.train.exit_codes import LOST_EXIT_CODE, STOPPED_EXIT_CODE
from tests.train.launched import ROOT, overrides, records, run

RUN_SH = ["bash", "launch/run.sh", "--nproc", "2"]
STEPS = 120
SLOW = {"SLOW_RANK": "0", "SLOW_S": "0.2"}
"""Half a second a step, or a machine that comes back meets a job that has ended."""
GIVEN = [
    "model.moe.router._target_=tests.train.slow_router.SlowRouter",
    "train.elastic=true",
    # Loads of a micro-batch, or of the micro-steps so far, are others where fewer ranks make more micro-steps.
    "balance=aux_sequence",
    "optim.eps=1e-5",  # AdamW divides by what is smaller, and makes rounding large
    "parallel.ep=4",
    f"train.steps={STEPS}",
    "train.eval_every_steps=50",
    "train.eval_tokens=128",
    # What is left over when ranks are lost is not to wait for long in a start that cannot be.
    "train.start_timeout_s=40",
]
WITHIN_S = 280.0
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


class Machines:
    """Processes that stand for machines, each with a name; what they print goes into files."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder = folder
        self.words = words
        self.running: dict[str, subprocess.Popen] = {}
        self.victims: list[psutil.Process] = []

    def start(self, name: str) -> subprocess.Popen:
        told = {"MOESYS_NODE": name, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        with (self.folder / f"{name}.out").open("a") as output:
            process = subprocess.Popen(
                self.words,
                cwd=ROOT,
                env=os.environ | told | SLOW,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running[name] = process
        return process

    def ranks(self, name: str) -> list[psutil.Process]:
        agent = psutil.Process(self.running[name].pid)
        return [c for c in agent.children(recursive=True) if c.environ().get("RANK")]

    def lose(self, name: str) -> None:
        """SIGKILL to all that runs there, as power that fails."""
        process = self.running.pop(name)
        if process.poll() is None:
            agent = psutil.Process(process.pid)
            for victim in [agent, *agent.children(recursive=True)]:
                victim.kill()
                self.victims.append(victim)
        process.wait()

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def close(self) -> None:
        for name in list(self.running):
            self.lose(name)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def elastic(folder: Path, data: Path, port: int, stack: ExitStack, *more: str) -> Machines:
    words = ["--relaunch", "0", "--nodes", "1:2", "--meeting", f"127.0.0.1:{port}"]
    arguments = overrides(folder / "run", data, *GIVEN, *more)
    machines = Machines(folder, [*RUN_SH, *words, *arguments])
    stack.callback(machines.close)
    return machines


def wait_for_start(machines: Machines, worlds: list[int], *, steps_after: int) -> None:
    """Until the starts had these numbers of ranks, and the last one has made so many steps."""
    folder, deadline = machines.folder / "run", time.monotonic() + WITHIN_S
    while True:
        starts = records(folder, "start")
        found = [start["world_size"] for start in starts]
        last = (records(folder, "train") or [{"step": 0}])[-1]["step"]
        if found == worlds and last >= starts[-1]["resumed_from_step"] + steps_after:
            return
        said = "\n".join(machines.said(name) for name in machines.running)[-6000:]
        assert found == worlds[: len(found)], said
        assert all(p.poll() is None for p in machines.running.values()), said
        assert time.monotonic() < deadline, f"{found} step {last}\n{said}"
        time.sleep(0.1)


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def assert_like_one_run(folder: Path, expected: list[dict]) -> None:
    """Every step once, with the batch in tokens kept and the losses of an undisturbed run but for rounding."""
    found = records(folder, "train")
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    assert [r["tokens"] for r in found] == [r["tokens"] for r in expected]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-5)


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLOW_RANK", "none")
        run(4, overrides(folder, tiny_data, *GIVEN))
    return records(folder, "train")


def test_a_lost_machine_is_done_without_until_it_comes_back(
    undisturbed, tiny_data, tmp_path, stack
):
    port = free_port()
    machines = elastic(tmp_path, tiny_data, port, stack, "checkpoint.every_steps=5")
    machines.start("a")
    wait_for_port(port)  # a serves the meeting, and is not lost
    machines.start("b")
    wait_for_world(machines, 4, steps_after=7)
    before = [s["world_size"] for s in records(tmp_path / "run", "start")]
    machines.lose("b")
    wait_for_start(machines, [*before, 2], steps_after=3)
    machines.start("b")
    wait_for_start(machines, [*before, 2, 4], steps_after=3)
    ends = [process.wait(timeout=WITHIN_S) for process in machines.running.values()]
    assert ends == [0, 0], machines.said("a")
    starts = records(tmp_path / "run", "start")
    assert starts[-2]["resumed_from_step"] >= 5
    assert [s["ep"] for s in starts[-3:]] == [4, 2, 4]
    assert starts[-2]["nodes"] == ["a"]
    assert starts[-1]["nodes"] == ["a", "b"]
    assert_like_one_run(tmp_path / "run", undisturbed)


def wait_for_world(machines: Machines, size: int, *, steps_after: int) -> None:
    """As `wait_for_start`, for a first machine that may, or may not, begin before the second is there."""
    deadline = time.monotonic() + WITHIN_S
    while not any(s["world_size"] == size for s in records(machines.folder / "run", "start")):
        assert time.monotonic() < deadline, machines.said("a")[-6000:]
        time.sleep(0.1)
    worlds = [s["world_size"] for s in records(machines.folder / "run", "start")]
    wait_for_start(machines, worlds, steps_after=steps_after)


def test_the_machine_of_the_meeting_is_lost(tiny_data, tmp_path, stack):
    """The others leave with 76 and what to do about it; started again they go on."""
    port = free_port()
    machines = elastic(tmp_path, tiny_data, port, stack, "train.steps=4000")
    machines.start("a")
    wait_for_port(port)
    other = machines.start("b")
    wait_for_world(machines, 4, steps_after=7)
    ranks = machines.ranks("b")
    machines.lose("a")
    assert other.wait(timeout=60) == LOST_EXIT_CODE, machines.said("b")
    assert "the machine that torchrun's agents meet on does not answer" in machines.said("b")
    assert not [rank for rank in ranks if rank.is_running()]
    saved = int(step_folders(tmp_path / "run" / "checkpoints")[0].name.removeprefix("step_"))
    machines.start("b")
    worlds = [s["world_size"] for s in records(tmp_path / "run", "start")]
    wait_for_start(machines, [*worlds, 2], steps_after=3)
    assert records(tmp_path / "run", "start")[-1]["resumed_from_step"] == saved
    machines.running["b"].send_signal(signal.SIGTERM)
    assert machines.running["b"].wait(timeout=120) == STOPPED_EXIT_CODE


MEETING = """
import signal, sys, torch.distributed as dist
store = dist.TCPStore("localhost", int(sys.argv[1]), is_master=True, wait_for_workers=False)
signal.pause()
"""


def test_a_meeting_on_a_machine_of_its_own_outlives_each_node(tiny_data, tmp_path, stack):
    """As docs/launch.md has it: the first node, with rank 0, is lost, and the second goes on alone."""
    port = free_port()
    meeting = subprocess.Popen([sys.executable, "-c", MEETING, str(port)])
    stack.callback(meeting.wait)
    stack.callback(meeting.kill)
    wait_for_port(port)
    machines = elastic(tmp_path, tiny_data, port, stack, "train.steps=4000")
    machines.start("a")
    machines.start("b")
    wait_for_world(machines, 4, steps_after=7)
    worlds = [s["world_size"] for s in records(tmp_path / "run", "start")]
    first = records(tmp_path / "run", "start")[-1]["nodes"][0]
    machines.lose(first)
    wait_for_start(machines, [*worlds, 2], steps_after=3)
    (left,) = machines.running
    assert records(tmp_path / "run", "start")[-1]["nodes"] == [left]
    machines.running[left].send_signal(signal.SIGTERM)
    assert machines.running[left].wait(timeout=120) == STOPPED_EXIT_CODE


def test_one_machine_is_asked_to_leave(tiny_data, tmp_path, stack):
    """A signal to one agent takes its machine out; to both, it stops the job."""
    port = free_port()
    machines = elastic(tmp_path, tiny_data, port, stack, "train.steps=4000")
    machines.start("a")
    wait_for_port(port)
    machines.start("b")
    wait_for_world(machines, 4, steps_after=3)
    worlds = [s["world_size"] for s in records(tmp_path / "run", "start")]
    leaving = machines.running.pop("b")
    leaving.send_signal(signal.SIGTERM)
    assert leaving.wait(timeout=120) == STOPPED_EXIT_CODE, machines.said("b")
    (stopped_at,) = [r["step"] for r in records(tmp_path / "run", "stop")][-1:]
    wait_for_start(machines, [*worlds, 2], steps_after=3)
    assert records(tmp_path / "run", "start")[-1]["resumed_from_step"] == stopped_at
    machines.running["a"].send_signal(signal.SIGUSR2)
    assert machines.running["a"].wait(timeout=120) == STOPPED_EXIT_CODE


def test_without_elastic_a_lost_machine_ends_the_job(tiny_data, tmp_path, stack):
    """Two machines as an allocation has them: the one that is left says whom it lost, and nothing runs on."""
    port = free_port()
    arguments = overrides(tmp_path / "run", tiny_data, *GIVEN, "train.steps=4000")
    agent = [
        sys.executable,
        "-m",
        "moesys.train.torchrun",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "2",
    ]
    machines = Machines(tmp_path, [])
    stack.callback(machines.close)
    for rank, name in enumerate("ab"):
        where = ["--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        machines.words = [*agent, *where, "-m", "moesys.train", *arguments]
        machines.start(name)
    wait_for_start(machines, [4], steps_after=3)
    ranks = machines.ranks("a")
    machines.lose("b")
    assert machines.running["a"].wait(timeout=60) == LOST_EXIT_CODE, machines.said("a")
    said = machines.said("a")
    assert "rank 2 died at step" in said or "rank 3 died at step" in said
    assert "ended first, exit code 76" in said
    assert not [rank for rank in ranks if rank.is_running()]
