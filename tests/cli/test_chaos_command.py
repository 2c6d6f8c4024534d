"""`moesys chaos`: what it would do, and what it refuses, before anything starts."""

import shlex
import sys
from pathlib import Path

import pytest

from moesys.chaos.faults import KINDS, parse_faults
from moesys.cli import main
from tests.config.prepared import prepared_data


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    data = prepared_data(tmp_path / "data")
    given = ["experiment=quickstart", f"data.path={data}", "checkpoint.every_steps=5"]
    return [*given, f"run.dir={tmp_path / 'runs'}"]


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["chaos", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


def test_given_faults_and_the_line_that_would_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "kill rank=1 step=4 phase=exchange; slow rank=0 step=7"
    out = dry_run(capsys, "--faults", text, *words, "train.steps=20")
    (tmp_path / "faults").write_text(text.replace(";", "\n"))
    assert dry_run(capsys, "--faults", f"@{tmp_path / 'faults'}", *words, "train.steps=20") == out
    title, first, second, line = out.splitlines()
    assert title == "# faults: 2 faults"
    assert parse_faults(f"{first}; {second}") == parse_faults(text)
    where, _, command = line.removeprefix("# in ").partition(": ")
    assert where == str(tmp_path / "runs" / "faults")
    assert shlex.split(command) == [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("--max-restarts=4", "-m", "moesys.train", *words[:-1], "train.steps=20"),
        *(f"run.dir={tmp_path / 'runs' / 'faults'}", "train.log_every_steps=1"),
    ]
    assert not (tmp_path / "runs").exists()


def test_a_job_whose_torchrun_is_killed_is_started_by_run_sh(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    faults = "agent rank=0 step=3; slow rank=0 step=5; agent rank=1 step=9"
    line = dry_run(capsys, "--faults", faults, *words).splitlines()[-1]
    command = shlex.split(line.partition(": ")[2])
    assert command[:3] == ["env", f"PYTHON={sys.executable}", "PET_MAX_RESTARTS=6"]
    assert Path(command[3]).is_file()
    assert command[4:8] == ["--nproc", "2", "--relaunch", "2"]
    assert command[8] == words[0]


def test_a_table_has_a_job_for_each_kind(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = dry_run(capsys, "--table", "--seeds", "3", *words)
    titles = [line for line in out.splitlines() if line.startswith("# ") and "faults" in line]
    assert titles == [f"# {kind}: 3 faults" for kind in KINDS]
    again = dry_run(capsys, "--table", "--seeds", "3", "--seed", "1", "--kinds", "kill,nan", *words)
    assert [line.split()[0] for line in again.splitlines() if line[0] != "#"] == (
        ["kill"] * 3 + ["nan"] * 3
    )
    faults = [line for line in again.splitlines() if line[0] != "#"]
    last = max(fault.step for fault in parse_faults("\n".join(faults)))
    # With room for the last fault's recovery.
    assert f"train.steps={last + 14} " in again


def test_faults_by_chance_leave_steps_to_come_back_in(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = dry_run(capsys, "--mean-steps", "6", "--kinds", "kill", *words, "train.steps=100")
    faults = parse_faults("\n".join(line for line in out.splitlines() if line[0] != "#"))
    assert len(faults) > 5
    assert max(fault.step for fault in faults) <= 100 - 11


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say which faults: one of --faults, --mean-steps, --mean-s, --table"),
        (["--faults", "kill rank=2 step=4"], "rank must be below 2"),
        (["--faults", "kil rank=1 step=4"], "did you mean kill?"),
        (["--faults", "@nowhere"], "--faults @nowhere: cannot be read"),
        (["--mean-steps", "0"], "mean_steps_between=0"),
        (["--mean-s", "0"], "must be above 0"),
        (["--table", "--kinds", "kil"], "did you mean kill?"),
        (["--table", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--table", "checkpoint.every_steps=0"], "--table needs checkpoints"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str],
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [word for word in arguments if "=" in word and not word.startswith("kil")]
    options = [word for word in arguments if word not in overrides]
    assert main(["chaos", *options, *words, *overrides]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_something_in_it_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").touch()
    assert main(["chaos", "--table", *words]) == 2
    assert "is not empty" in capsys.readouterr().err
