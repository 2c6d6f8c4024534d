"""The ledger of real runs: killed with SIGKILL and resumed, stopped, hung; and the split of a start."""

import json
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from moesys.report.goodput import PARTS, ledger_of
from moesys.report.records import time_of
from moesys.report.run import read_run
from moesys.train.metrics import read_metrics
from moesys.train.start_up import (
    SUBMITTED_VARIABLE,
    StartUp,
    begin_start_up,
    created_unix_s,
    submitted_unix_s,
)
from moesys.train.timing import StepTimes
from tests.train.launched import (
    finish,
    kill_all,
    one_rank,
    overrides,
    records,
    run,
    start,
    wait_for_end,
    wait_for_step,
)


def assert_adds_up(folder) -> dict[str, Any]:
    """The last goodput record is the file's own ledger, whose parts are the wall time; returns it."""
    ledger = ledger_of(read_metrics(folder / "metrics.jsonl"))
    told = records(folder, "goodput")[-1]
    assert sum(ledger.parts_ms.values()) == ledger.wall_ms
    assert {name: told[name] for name in ledger.as_dict()} == ledger.as_dict()
    assert read_run(folder).ledger == ledger
    return told


@pytest.mark.chaos
def test_steps_lost_to_a_kill_are_counted_once_and_the_parts_are_the_wall_time(
    tiny_data, tmp_path, monkeypatch
):
    folder = tmp_path / "killed"
    submitted = time.time() - 3
    monkeypatch.setenv(SUBMITTED_VARIABLE, str(submitted))
    process = start(2, overrides(folder, tiny_data, "train.steps=4000"))
    wait_for_step(process, folder, 13)
    kill_all(process)
    finish(process)
    before = read_metrics(folder / "metrics.jsonl")
    reached = [record for record in before if record["kind"] == "train"][-1]["step"]
    output = run(2, overrides(folder, tiny_data, f"train.steps={reached + 3}"))
    resumed = records(folder, "start")[1]["resumed_from_step"]
    assert resumed < reached, "nothing was lost: the kill came with the checkpoint"

    told = assert_adds_up(folder)
    undone = [r for r in before if r["kind"] in ("train", "eval") and r["step"] > resumed]
    (left,) = records(folder, "undone")
    assert told["steps_lost"] == left["steps"] == reached - resumed
    assert told["repeated_s"] == pytest.approx(
        sum(r.get("step_ms", 0.0) + r.get("eval_ms", 0.0) for r in undone) / 1e3, abs=2e-3
    )
    kept = records(folder, "train")
    assert [r["step"] for r in kept] == list(range(1, reached + 4))
    assert told["productive_s"] == pytest.approx(
        sum(r["step_ms"] - r["data_ms"] for r in kept) / 1e3, abs=5e-3
    )
    last_alive, again = time_of(before[-1]), records(folder, "start")[1]
    assert told["down_s"] == pytest.approx(again["created_unix_s"] - last_alive, abs=2e-3)
    assert told["queue_s"] == pytest.approx(before[0]["created_unix_s"] - submitted, abs=2e-3)
    stop = records(folder, "stop")[-1]
    assert told["wall_s"] == pytest.approx(stop["unix_s"] - submitted, abs=2e-3)
    assert told["starts"] == 2
    assert told["hang_s"] == 0

    # The console, summary.json and the records say the same.
    assert f"goodput {told['goodput_pct']:.1f} %: productive " in output
    assert "2 starts" in output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["goodput"] == {name: told[name] for name in summary["goodput"]}
    kinds = [record["kind"] for record in read_metrics(folder / "metrics.jsonl")]
    assert kinds[-2:] == ["goodput", "stop"]


def test_a_start_is_split_and_its_parts_are_the_time_to_its_record(
    tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setenv(SUBMITTED_VARIABLE, str(int(time.time()) - 1))
    folder = tmp_path / "run"
    run(1, overrides(folder, tiny_data, "parallel.ep=1", "train.log_every_steps=5"))
    (first,) = records(folder, "start")
    split = first["start_up_s"]
    assert list(split) == [
        *("queue", "import", "configuration", "rendezvous", "data", "model", "load", "measure"),
    ]
    assert sum(split.values()) == pytest.approx(
        first["unix_s"] - first["submitted_unix_s"], abs=0.05
    )
    assert split["import"] > 0.2, "torch is not loaded in less"
    told = assert_adds_up(folder)
    assert told["start_up_parts_s"] == pytest.approx(
        {**split, "first_step": told["start_up_parts_s"]["first_step"]}, abs=2e-3
    )
    trained = records(folder, "train")
    assert [r["step"] for r in trained] == [5, 10, 15, 20]
    assert told["start_up_parts_s"]["first_step"] == trained[0]["first_step_ms"] / 1e3
    assert not any("first_step_ms" in r for r in trained[1:])
    # Four steps of five leave no record, and their time is not lost.
    assert all(r["unrecorded_step_ms"] > 0 for r in trained)
    assert told["productive_s"] + told["data_s"] == pytest.approx(
        sum(r["step_ms"] + r["unrecorded_step_ms"] for r in trained) / 1e3, abs=5e-3
    )


@pytest.mark.chaos
def test_a_hang_is_counted_as_one(tiny_data, tmp_path):
    folder = tmp_path / "hung"
    given = overrides(folder, tiny_data, "train.steps=4000", "train.timeout_s=6")
    process = start(2, given)
    wait_for_step(process, folder, 3)
    ranks = [one_rank(process, rank) for rank in range(2)]
    ranks[1].send_signal(signal.SIGSTOP)
    wait_for_end(ranks[0], timeout_s=60)
    ranks[1].kill()
    code, output = finish(process)
    assert code != 0
    (stop,) = records(folder, "stop")
    assert stop["cause"] == "hung", output
    told = assert_adds_up(folder)
    last = records(folder, "train")[-1]
    assert told["hang_s"] == pytest.approx(stop["unix_s"] - last["unix_s"], abs=0.2)
    assert told["hang_s"] > 5


def test_marks_are_parts_and_a_clock_set_back_takes_nothing_away():
    moments = iter([12.0, 11.0, 11.5, 14.0])
    clock = StartUp(10.0, 4.0, clock=lambda: next(moments))
    for part in ("import", "model", "data", "model"):
        clock.mark(part)
    assert clock.fields() == {
        "created_unix_s": 10.0,
        "submitted_unix_s": 4.0,
        "start_up_s": {"queue": 6.0, "import": 2.0, "model": 2.5, "data": 0.5},
    }
    restarted = StartUp(10.0, 4.0, is_restart=True, clock=lambda: 12.0)
    restarted.mark("import")
    assert restarted.fields()["start_up_s"] == {"import": 2.0}


def test_this_process_began_when_the_system_says():
    clock = begin_start_up({SUBMITTED_VARIABLE: "5", "TORCHELASTIC_RESTART_COUNT": "1"})
    told = clock.fields()
    assert told["created_unix_s"] == pytest.approx(psutil.Process().create_time(), abs=1.1)
    assert told["submitted_unix_s"] == 5.0
    assert list(told["start_up_s"]) == ["import"]
    assert begin_start_up({SUBMITTED_VARIABLE: "5"}).fields()["start_up_s"]["queue"] > 1e9


@pytest.mark.parametrize("text", ["soon", "nan", "inf", "-1", "2026-01-01"])
def test_a_submission_that_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match=rf"{SUBMITTED_VARIABLE}={text}: must be seconds .*unset"):
        submitted_unix_s({SUBMITTED_VARIABLE: text})
    assert submitted_unix_s({SUBMITTED_VARIABLE: ""}) is submitted_unix_s({}) is None
    assert submitted_unix_s({SUBMITTED_VARIABLE: "17.5"}) == 17.5


def test_steps_without_a_record_are_told_by_the_next():
    times = StepTimes()
    times.add(2.0, {"data": 100.0})
    assert times.fields(2.0, {"data": 100.0}) == {"first_step_ms": 2000.0}
    times.add(0.5, {"data": 40.0, "forward": 10.0})
    times.add(0.25, {})
    times.add(1.0, {"data": 7.0})
    assert times.fields(1.0, {"data": 7.0}) == {
        "unrecorded_step_ms": 750.0,
        "unrecorded_data_ms": 40.0,
    }
    times.add(1.0, {"data": 7.0})
    assert times.fields(1.0, {"data": 7.0}) == {}


def test_every_part_is_told():
    assert set(ledger_of([]).as_dict()) == {
        *("goodput_pct", "wall_s", "starts", "steps_lost", "start_up_parts_s"),
        *(f"{part}_s" for part in PARTS),
    }


def test_the_first_moment_of_a_process_is_known_to_a_hundredth_of_a_second() -> None:
    told = "from moesys.train.start_up import created_unix_s as c; print(c())"
    for _ in range(3):
        before = time.time()
        process = subprocess.Popen([sys.executable, "-c", told], stdout=subprocess.PIPE, text=True)
        after = time.time()
        assert before - 0.03 <= float(process.communicate()[0]) <= after + 0.03
    assert abs(created_unix_s() - psutil.Process().create_time()) < 1.1
