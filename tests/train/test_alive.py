"""Stopped, frozen, superseded or started with other ranks, a run goes on where it was."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from moesys.checkpoint.folder import step_folders
from moesys.launch.status import read_status
from moesys.train.exit_codes import STOPPED_EXIT_CODE
from moesys.train.grace import Pace, plan_stop
from tests.train.launched import (
    ROOT,
    command,
    finish,
    kill_all,
    one_rank,
    overrides,
    records,
    run,
    start,
    wait_for_step,
)

ON_ANY_RANKS = [
    *("model.moe.router._target_=moesys.moe.routers.TopKRouter", "optim.eps=1e-5"),
    *("balance=none", "model.moe.balance.bias_update_rate=0"),
]
"""The same on other numbers of ranks but for rounding, which epsilon keeps small: noise is drawn per rank, and the global
loss counted by micro-step."""


def pace(elapsed_s=1.0, eval_s=0.0, save_s=0.0, saving_s=0.0) -> Pace:
    return Pace(elapsed_s=elapsed_s, eval_s=eval_s, save_s=save_s, saving_s=saving_s)


# What there is time for: numbers.


@pytest.mark.parametrize(
    ("given", "evaluates", "saves"),
    [
        (pace(), True, True),
        (pace(save_s=9.0), True, True),
        (pace(save_s=9.1), False, False),
        (pace(save_s=5.0, saving_s=4.5), False, False),
        (pace(save_s=5.0, eval_s=4.0), True, True),
        (pace(save_s=5.0, eval_s=4.1), False, True),
        (pace(elapsed_s=60.0), True, True),  # no save was measured: it is tried
    ],
)
def test_what_fits_into_ten_seconds(given, evaluates, saves):
    plan = plan_stop(10.0, given)
    assert (plan.evaluate, plan.save) == (evaluates, saves)
    assert bool(plan.note) == (not evaluates)


# A job of one process.


def alone(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "moesys.train", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGUSR2])
def test_a_signal_saves_and_the_exit_code_says_start_again(tiny_data, tmp_path, number):
    folder = tmp_path / "run"
    more = ["parallel.ep=1", "train.steps=4000", "checkpoint.every_steps=0"]
    process = alone(overrides(folder, tiny_data, *more))
    wait_for_step(process, folder, 3)
    process.send_signal(number)
    code, output = finish(process)
    assert code == STOPPED_EXIT_CODE, output
    (stop,) = records(folder, "stop")
    assert stop["reason"] == "stopped"
    (saved,) = step_folders(folder / "checkpoints")
    assert saved.name == f"step_{stop['step']:08d}"
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.reason) == (
        "requeued",
        f"stopped by {number.name} at step {stop['step']}",
    )


@pytest.mark.chaos
def test_a_save_that_does_not_fit_is_left_out(tiny_data, tmp_path):
    folder = tmp_path / "run"
    more = ["parallel.ep=1", "train.steps=4000", "checkpoint.every_steps=5", "train.grace_s=0.001"]
    process = alone(overrides(folder, tiny_data, *more, "checkpoint.asynchronous=false"))
    wait_for_step(process, folder, 7)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == STOPPED_EXIT_CODE, output
    assert re.search(r"warning: no save: it would end .* train\.grace_s=0\.001", output), output
    (stop,) = records(folder, "stop")
    assert stop["note"].startswith("no save")
    last = step_folders(folder / "checkpoints")[0]
    assert last.name == f"step_{stop['step'] // 5 * 5:08d}"


# Several ranks, under torchrun.


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(2, overrides(folder, tiny_data))
    return [r["loss"] for r in records(folder, "train")]


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("whom", ["agent", "rank 1"])
def test_each_signal_stops_all_and_the_run_goes_on_bitwise(
    undisturbed, tiny_data, tmp_path, number, whom
):
    folder = tmp_path / "run"
    arguments = ["-m", "moesys", "train", "--nproc", "2", *overrides(folder, tiny_data)]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(process, folder, 7)
    (process if whom == "agent" else one_rank(process, 1)).send_signal(number)
    code, output = finish(process)
    assert code == STOPPED_EXIT_CODE, output
    run(2, overrides(folder, tiny_data))
    assert [r["loss"] for r in records(folder, "train")] == undisturbed


@pytest.mark.chaos
def test_a_start_that_wakes_up_after_another_changes_nothing(tiny_data, tmp_path):
    """As on a node that was cut off: its lock is gone, its process is not."""
    folder = tmp_path / "run"
    arguments = overrides(folder, tiny_data, "parallel.ep=1", "train.steps=4000")
    first = alone([*arguments, "checkpoint.every_steps=7"])
    wait_for_step(first, folder, 16)
    first.send_signal(signal.SIGSTOP)
    (folder / ".lock").unlink()  # the next start locks a new file, as on another node
    second = alone([*arguments, "checkpoint.every_steps=10"])
    since = records(folder, "train")[-1]["step"]
    while len(records(folder, "start")) < 2:
        assert second.poll() is None, second.communicate()[0]
        time.sleep(0.05)
    wait_for_step(second, folder, since + 25)
    second.send_signal(signal.SIGTERM)
    code, output = finish(second)
    assert code == STOPPED_EXIT_CODE, output
    steps = step_folders(folder / "checkpoints")
    before = {path: (path / "manifest.json").read_bytes() for path in steps}
    metrics = (folder / "metrics.jsonl").read_bytes()
    first.send_signal(signal.SIGCONT)
    code, output = finish(first)
    assert code not in (0, STOPPED_EXIT_CODE)
    assert "generation 2 (process " in output, output
    assert "has taken over from generation 1 (process " in output, output
    assert {
        path: (path / "manifest.json").read_bytes() for path in step_folders(folder / "checkpoints")
    } == before
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    status = read_status(folder)
    assert status is not None
    assert status.state == "requeued"


@pytest.mark.chaos
def test_a_stopped_rank_is_found_and_the_job_restarts_in_place(undisturbed, tiny_data, tmp_path):
    folder = tmp_path / "run"
    given = command(2, overrides(folder, tiny_data))
    given.insert(3, "--max-restarts=1")
    process = subprocess.Popen(
        given,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(process, folder, 8)
    one_rank(process, 1).send_signal(signal.SIGSTOP)
    code, output = finish(process, timeout_s=240)
    assert code == 0, output
    assert "rank 1 is stopped, it is killed" in output
    assert len(records(folder, "start")) == 2
    assert sorted(path.name for path in (folder / "generations").iterdir()) == ["000001", "000002"]
    assert [r["loss"] for r in records(folder, "train")] == undisturbed


@pytest.mark.chaos
def test_other_numbers_of_ranks_train_the_same_run(tiny_data, tmp_path):
    more = [*ON_ANY_RANKS, "train.elastic=true", "parallel.ep=4", "train.steps=18"]
    run(4, overrides(tmp_path / "one", tiny_data, *more))
    folder = tmp_path / "three"
    for ranks, until in ((4, 7), (2, 13), (4, None)):
        process = start(ranks, overrides(folder, tiny_data, *more))
        if until is None:
            code, output = finish(process)
            assert code == 0, output
        else:
            wait_for_step(process, folder, until)
            kill_all(process)
            finish(process)
    starts = records(folder, "start")
    assert [(s["world_size"], s["ep"]) for s in starts] == [(4, 4), (2, 2), (4, 4)]
    assert starts[1]["resumed_from_step"] >= 5
    expected = records(tmp_path / "one", "train")
    found = records(folder, "train")
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    assert [r["tokens"] for r in found] == [r["tokens"] for r in expected]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-5)
