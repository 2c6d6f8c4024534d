"""SIGTERM, SIGUSR1 and SIGUSR2, to whomever and whenever they come: the job saves what it can and leaves with 75."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from moesys.checkpoint.folder import step_folders
from moesys.launch.status import read_status
from moesys.train.exit_codes import STOPPED_EXIT_CODE
from moesys.train.grace import Pace, must_leave_evaluation
from tests.train.launched import ROOT, command, finish, one_rank, overrides, records, wait_for_step

TRAIN = [sys.executable, "-m", "moesys.train"]
STARTS = {
    "moesys train": [sys.executable, "-m", "moesys", "train", "--nproc", "2"],
    "run.sh": ["bash", "launch/run.sh", "--nproc", "2"],
    "run.sh, no relaunch": ["bash", "launch/run.sh", "--nproc", "2", "--relaunch", "0"],
    "torchrun": [
        *command(2, [])[:-2],
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2",
        *("-m", "moesys.train"),
    ],
}


def start(words: list[str], arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [*words, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(process: subprocess.Popen, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal (proc(5))."""
    said = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (mask,) = (line.split()[1] for line in said.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) & 1 << (number - 1))


# How long an evaluation goes on: numbers.


@pytest.mark.parametrize(
    ("seconds", "leaves"),
    [
        ({}, False),  # nobody has asked, whatever the save takes
        ({"elapsed_s": 1.0, "eval_s": 4.0}, False),
        ({"elapsed_s": 1.0, "eval_s": 5.1}, True),
        ({"elapsed_s": 5.1, "eval_s": 0.0, "save_s": 0.0}, True),  # never saved: 5 s are for it
        ({"elapsed_s": 4.9, "eval_s": 0.0, "save_s": 0.0}, False),
        ({"elapsed_s": 1.0, "saving_s": 4.1}, True),
    ],
)
def test_an_evaluation_goes_on_while_the_save_still_fits(seconds, leaves):
    given = {"elapsed_s": 0.0, "eval_s": 1.0, "save_s": 4.0, "saving_s": 0.0} | seconds
    if not seconds:
        given |= {"save_s": 40.0}
    assert must_leave_evaluation(10.0, Pace(**given)) == leaves


# A job of one process.


def test_while_torch_is_imported(tiny_data, tmp_path):
    process = start(TRAIN, overrides(tmp_path / "run", tiny_data, "parallel.ep=1"))
    wait_until(process, lambda: handles(process.pid, signal.SIGUSR1))
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert (code, output) == (
        STOPPED_EXIT_CODE,
        "moesys: SIGUSR1 before the first step: nothing to save\n",
    )
    assert not (tmp_path / "run").exists()


def test_between_the_turn_to_write_and_the_first_step(tiny_data, tmp_path):
    folder = tmp_path / "run"
    arguments = overrides(folder, tiny_data, "parallel.ep=1", "train.steps=4000")
    process = start(TRAIN, arguments)
    wait_until(process, lambda: read_status(folder) is not None)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == STOPPED_EXIT_CODE, output
    status = read_status(folder)
    assert status is not None
    assert status.state == "requeued"
    assert status.reason == "stopped before its first step", "nothing of it was tested"


def test_an_evaluation_that_takes_too_long_is_made_by_the_next_start(tiny_data, tmp_path):
    folder = tmp_path / "run"
    more = ["parallel.ep=1", "checkpoint.every_steps=0", "train.eval_every_steps=4"]
    arguments = overrides(folder, tiny_data, *more, "train.eval_tokens=200000")
    process = start(TRAIN, [*arguments, "train.steps=400", "train.grace_s=0.4"])
    wait_for_step(process, folder, 4)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == STOPPED_EXIT_CODE, output
    (stop,) = records(folder, "stop")
    assert (stop["step"], stop["reason"]) == (4, "stopped")
    assert stop["note"].startswith("no evaluation: what is left of it")
    assert not records(folder, "eval")
    assert [path.name for path in step_folders(folder / "checkpoints")] == ["step_00000004"]
    process = start(TRAIN, [*arguments, "train.steps=400", "train.eval_tokens=256"])
    wait_for_step(process, folder, 5)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == STOPPED_EXIT_CODE, output
    assert [r["step"] for r in records(folder, "eval")][:1] == [4]


# Two ranks.

CASES = [
    *[("moesys train", "launcher", "step", [n]) for n in ("SIGTERM", "SIGUSR1", "SIGUSR2")],
    *[("moesys train", whom, "step", ["SIGUSR1"]) for whom in ("rank 0", "rank 1", "group")],
    ("moesys train", "launcher", "step", ["SIGTERM"] * 2),
    ("moesys train", "launcher", "step", ["SIGUSR2", "SIGTERM", "SIGTERM"]),
    ("moesys train", "rank 1", "step", ["SIGTERM", "SIGTERM"]),
    *[("moesys train", whom, "start-up", ["SIGTERM"]) for whom in ("launcher", "rank 1")],
    *[("moesys train", whom, "save", ["SIGUSR2"]) for whom in ("launcher", "rank 1")],
    *[("moesys train", whom, "evaluation", ["SIGTERM"]) for whom in ("launcher", "rank 1")],
    *[("run.sh", whom, "step", ["SIGUSR2"]) for whom in ("launcher", "rank 0", "group")],
    ("run.sh", "launcher", "start-up", ["SIGUSR1"]),
    ("run.sh", "group", "step", ["SIGTERM", "SIGTERM"]),
    ("run.sh, no relaunch", "launcher", "step", ["SIGTERM"]),
    ("run.sh, no relaunch", "launcher", "start-up", ["SIGUSR2"]),
    *[("torchrun", whom, "step", ["SIGUSR1"]) for whom in ("launcher", "rank 1")],
]


def send(process: subprocess.Popen, whom: str, name: str) -> None:
    number = signal.Signals[name]
    if whom == "group":
        os.killpg(process.pid, number)
    elif whom == "launcher":
        process.send_signal(number)
    else:
        one_rank(process, int(whom.split()[1])).send_signal(number)


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if child.environ().get("RANK")]


def wait_for_phase(process: subprocess.Popen, folder: Path, when: str) -> None:
    if when == "start-up":  # both import torch
        wait_until(process, lambda: len(ranks(process)) == 2)
        pids = [rank.pid for rank in ranks(process)]
        wait_until(process, lambda: all(handles(pid, signal.SIGUSR1) for pid in pids))
    elif when == "save":
        saves = folder / "checkpoints"
        wait_until(process, lambda: saves.exists() and any(saves.glob("*.tmp*")))
    elif when == "evaluation":
        wait_for_step(process, folder, 10)
    else:
        wait_for_step(process, folder, 7)


@pytest.mark.chaos
@pytest.mark.parametrize(("how", "whom", "when", "names"), CASES)
def test_each_signal_to_each_of_them_at_each_time(tiny_data, tmp_path, how, whom, when, names):
    folder = tmp_path / "run"
    more = ["train.steps=4000", "train.eval_tokens=20000", "checkpoint.asynchronous=false"]
    process = start(STARTS[how], overrides(folder, tiny_data, *more))
    wait_for_phase(process, folder, when)
    both = ranks(process)
    for name in names:
        if process.poll() is None:
            send(process, whom, name)
        time.sleep(0.2)
    code, output = finish(process)
    # torchrun knows no other code (docs/reliability.md).
    assert code == (1 if how == "torchrun" else STOPPED_EXIT_CODE), output
    assert not [rank for rank in both if rank.is_running()], "a rank is left"
    status = read_status(folder)
    if when == "start-up":
        assert status is None or status.state == "requeued"
        return
    assert status is not None
    assert status.state == "requeued"
    (stop,) = records(folder, "stop")
    assert stop["reason"] == "stopped"
    assert "note" not in stop
    assert step_folders(folder / "checkpoints")[0].name == f"step_{stop['step']:08d}"
    if when == "evaluation":
        assert [r["step"] for r in records(folder, "eval")][-1] == 10
