"""What Slurm knows about a run, runs without a scheduler, and the words of `moesys runs`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.cli import main
from moesys.cli.runs import age
from moesys.config.compose import compose
from moesys.launch.runs import (
    can_start,
    find_runs,
    last_record,
    read_progress,
    submission_of,
)
from moesys.launch.slurm import news, partition_problem
from moesys.launch.snapshot import write_config
from moesys.launch.status import STATES, State, Status, read_status, write_status


def status(state: State) -> Status:
    return Status(state=state, since_unix_s=0.0, job_id="3")


@pytest.mark.parametrize(
    ("state", "word", "told"),
    [
        ("running", "OUT_OF_MEMORY", "oom"),
        ("running", "OUT_OF_ME+", None),  # sacct's short form is not asked for
        ("failed", "OUT_OF_MEMORY", "oom"),
        ("running", "TIMEOUT", "timeout"),
        ("failed", "TIMEOUT", "timeout"),
        ("running", "NODE_FAIL", "failed"),
        ("queued", "CANCELLED by 1000", "failed"),
        ("requeued", "CANCELLED", "failed"),
        ("running", "COMPLETED", "failed"),
        ("running", "PENDING", "requeued"),
        ("queued", "PENDING", None),
        ("running", "RUNNING", None),
        ("requeued", "COMPLETING", None),
        ("failed", "FAILED", None),
        ("done", "COMPLETED", None),
        ("done", "TIMEOUT", None),
        ("running", None, None),
    ],
)
def test_what_slurm_adds(state: State, word: str | None, told: str | None) -> None:
    found = news(status(state), word)
    assert (found[0] if found else None) == told


@given(st.sampled_from(STATES), st.sampled_from(["TIMEOUT", "FAILED", "PENDING", "RUNNING", "X"]))
def test_what_slurm_adds_is_believed(state: State, word: str) -> None:
    """Whatever it says may follow, or writing it would change nothing."""
    from moesys.launch.status import next_state

    before = status(state)
    told = news(before, word)
    if told is not None:
        assert next_state(before, told[0], now_unix_s=1).state == told[0]


def test_a_partition_has_its_nodes_in_several_lines() -> None:
    answer = "small*|2\nsmall*|3\nlarge|40\n"
    assert partition_problem(None, 5, answer) is None
    assert partition_problem("large", 40, answer) is None
    problem = partition_problem(None, 6, answer)
    assert str(problem) == (
        "nodes=6 must be at most the 5 nodes of partition small: use nodes=5 or fewer, or another partition"
    )
    assert "must be one of large, small: did you mean large?" in str(
        partition_problem("large1", 1, answer)
    )


def a_run(folder: Path, steps: int = 9) -> Path:
    write_config(folder, compose([f"train.steps={steps}"]))
    record = {"kind": "train", "loss": 2.5, "tokens_per_s": 1000.0, "expert_load": [[1]]}
    lines = [json.dumps({**record, "step": step}) for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "eval"}\n{"torn')
    return folder


def test_progress_is_that_of_the_last_training_record(tmp_path: Path) -> None:
    progress = read_progress(a_run(tmp_path))
    assert (progress.step, progress.steps, progress.loss, progress.tokens_per_s) == (3, 9, 2.5, 1e3)
    assert last_record(tmp_path, "stop") is None
    assert read_progress(tmp_path / "empty").step is None


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(4):
            file.write(json.dumps({"kind": "train", "step": step, "expert_load": [0] * 300_000}))
            file.write("\n")
    record = last_record(tmp_path, "train")
    assert record is not None
    assert record["step"] == 3


def test_runs_are_found_below_a_folder_and_not_in_one(tmp_path: Path) -> None:
    for name in ("b", "a", "c/d"):
        a_run(tmp_path / name)
    a_run(tmp_path / "a" / "inner")
    (tmp_path / "s.sweep" / "code" / "x").mkdir(parents=True)
    a_run(tmp_path / "s.sweep" / "code" / "x")
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert sorted(found) == ["a", "b", "c/d"]


def test_list_says_where_each_run_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_status(a_run(tmp_path / "one"), "queued")
    a_run(tmp_path / "two", steps=3)
    assert main(["runs", "list", str(tmp_path), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["one"]["state"], rows["one"]["attempt"], rows["one"]["steps"]) == ("queued", 0, 9)
    assert (rows["two"]["state"], rows["two"]["step"]) == (None, 3)
    assert main(["runs", "list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["name", "state", "job", "step"]
    assert lines[1].split()[:6] == ["one", "queued", "-", "3/9", "2.5000", "1,000"]
    assert lines[2].split()[:4] == ["two", "?", "-", "3/3"]


def test_a_process_that_is_gone_is_told(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = os.uname().nodename
    for name, pid in (("gone", gone.pid), ("here", os.getpid())):
        write_status(a_run(tmp_path / name), "running")
        (tmp_path / name / ".lock").write_text(f"process {pid} on {host}\n")
    write_status(a_run(tmp_path / "elsewhere"), "running")
    (tmp_path / "elsewhere" / ".lock").write_text(f"process {gone.pid} on another\n")
    assert main(["runs", "list", str(tmp_path)]) == 0
    states = {path.name: read_status(path) for path in find_runs(tmp_path)}
    assert {name: s.state for name, s in states.items() if s} == {
        "gone": "failed",
        "here": "running",
        "elsewhere": "running",
    }


def test_tail_shows_records_where_there_is_no_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run")
    write_status(run, "running")
    write_status(run, "failed", reason="why not")
    assert main(["runs", "tail", str(run), "--lines", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == ["kind=eval", f"{run}: failed, why not"]
    (run / "slurm-7.log").write_text("one\ntwo\nthree\n")
    assert main(["runs", "tail", str(run), "--lines", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["two", "three"]


def test_a_local_run_is_told_to_save_and_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = (
        "import signal, sys, time, pathlib\n"
        "from moesys.train.folder import sole_writer\n"
        "from moesys.launch.status import write_status\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "with sole_writer(pathlib.Path(sys.argv[1])):\n"
        "    write_status(sys.argv[1], 'running')\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run)])
    deadline = time.monotonic() + 60
    while read_status(run) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert main(["runs", "cancel", str(run)]) == 0
    assert process.wait(timeout=60) == 75


@pytest.mark.parametrize("action", ["tail", "cancel", "resubmit"])
def test_an_unknown_run_is_refused(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", action, str(tmp_path)]) == 2
    assert "neither a run folder nor the name of one" in capsys.readouterr().err


def test_what_cannot_be_cancelled_or_submitted_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run")
    assert main(["runs", "resubmit", str(run)]) == 2
    assert "has no job.sbatch" in capsys.readouterr().err
    write_status(run, "running")
    write_status(run, "done")
    assert main(["runs", "cancel", str(run)]) == 2
    assert "is done: nothing to cancel" in capsys.readouterr().err
    assert can_start(read_status(run))
    assert main(["runs", "list", str(tmp_path / "nowhere")]) == 2


def test_a_point_of_a_sweep_is_submitted_alone(tmp_path: Path) -> None:
    (tmp_path / "s.sweep").mkdir()
    runs = [tmp_path / f"s-{number}" for number in range(3)]
    (tmp_path / "s.sweep" / "runs.txt").write_text("".join(f"{run}\n" for run in runs))
    found = submission_of(runs[2])
    assert (found.script, found.runs, found.tasks) == (
        *(tmp_path / "s.sweep" / "job.sbatch", (runs[2],), (2,)),
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (90061, "1 d 1 h"), (-5, "0 s")],
)
def test_ages_are_two_units_at_most(seconds: float, text: str) -> None:
    assert age(seconds) == text
