"""The status of a run: who may follow whom, attempts, and a file that is whole or the one before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.launch.status import (
    STATES,
    State,
    Status,
    job_id_of,
    main,
    next_state,
    read_status,
    write_status,
)


def play(*states: State) -> Status:
    status = None
    for second, state in enumerate(states):
        status = next_state(status, state, now_unix_s=second)
    assert status is not None
    return status


@pytest.mark.parametrize(
    ("states", "state", "attempt", "since"),
    [
        (("queued",), "queued", 0, 0),
        (("running",), "running", 1, 0),
        (("queued", "running", "done"), "done", 1, 2),
        (("queued", "running", "requeued", "running", "done"), "done", 2, 4),
        (("running", "running"), "running", 2, 1),
        (("running", "failed", "oom"), "oom", 1, 2),
        (("running", "failed", "timeout"), "timeout", 1, 2),
        (("running", "failed", "queued", "running"), "running", 2, 3),
        (("running", "failed", "requeued", "running", "done"), "done", 2, 4),
        # Not believed: the first word about an end stands.
        (("running", "done", "failed"), "done", 1, 1),
        (("running", "requeued", "done"), "requeued", 1, 1),
        (("running", "oom", "failed"), "oom", 1, 1),
        (("queued", "done"), "queued", 0, 0),
    ],
)
def test_who_follows_whom(
    states: tuple[State, ...], state: str, attempt: int, since: float
) -> None:
    status = play(*states)
    assert (status.state, status.attempt, status.since_unix_s) == (state, attempt, since)


@given(st.lists(st.sampled_from(STATES), min_size=1, max_size=12))
def test_attempts_are_the_times_it_ran_and_every_end_can_be_started_again(
    states: list[State],
) -> None:
    status = play(*states)
    assert status.attempt == states.count("running")  # which is always believed
    assert next_state(status, "running", now_unix_s=99).attempt == status.attempt + 1


@given(st.lists(st.sampled_from(STATES), min_size=1, max_size=12))
def test_a_reason_is_that_of_the_state(states: list[State]) -> None:
    status = None
    for number, state in enumerate(states):
        after = next_state(status, state, now_unix_s=number, reason=f"{state} {number}")
        assert after is status or after.reason == f"{state} {number}"
        status = after


def test_the_job_id_stays_until_another_comes() -> None:
    status = next_state(None, "queued", now_unix_s=0, job_id="17")
    assert next_state(status, "running", now_unix_s=1).job_id == "17"
    assert next_state(status, "queued", now_unix_s=1, job_id="18").job_id == "18"


def test_job_ids_of_slurm() -> None:
    assert job_id_of({}) is None
    assert job_id_of({"SLURM_JOB_ID": "5"}) == "5"
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_id_of(array) == "5_3"


def test_what_is_written_is_read_and_nothing_lies_beside(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    written = write_status(tmp_path / "run", "queued", job_id="3", reason='a "b"\nc')
    assert read_status(tmp_path / "run") == written
    assert set(json.loads((tmp_path / "run" / "status.json").read_text())) == {
        *("state", "since_unix_s", "job_id", "attempt", "reason")
    }
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [("{", "is not the status"), ("[]", "is not the status"), ('{"state": "x"}', "is not"),
     ('{"state": "x", "since_unix_s": 1}', "must be one of queued, running")],
)  # fmt: skip
def test_another_file_is_refused_by_name(tmp_path: Path, text: str, rule: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(ValueError, match=rule) as raised:
        read_status(tmp_path)
    assert str(tmp_path / "status.json") in str(raised.value)


def test_the_command_of_a_batch_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "21")
    assert main([str(tmp_path), "failed", "--reason", "exit code 9"]) == 0
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.job_id, status.reason) == ("failed", "21", "exit code 9")
    (tmp_path / "status.json").write_text("{")
    assert main([str(tmp_path), "failed"]) == 1


def test_it_starts_without_torch() -> None:
    code = "import sys, moesys.launch.status; print([m for m in sys.modules if m in ('torch', 'yaml', 'hydra')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
