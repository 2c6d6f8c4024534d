"""`moesys config`: show, check, diff and keys."""

import json
from pathlib import Path

import pytest

from moesys.cli import main
from moesys.config.build import leaf_types, to_dict
from moesys.config.compose import compose, load_resolved, to_yaml
from moesys.config.schema import RunConfig
from tests.config.prepared import prepared_data


def test_show_prints_what_can_be_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", "experiment=quickstart", "optim.lr=0.5"]) == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_resolved(path) == compose(["experiment=quickstart", "optim.lr=0.5"])
    assert main(["config", "show", "--json", "optim.lr=0.5"]) == 0
    assert json.loads(capsys.readouterr().out) == to_dict(compose(["optim.lr=0.5"]))


def test_show_reads_a_users_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ntrain:\n  steps: 123\n"
    )
    assert main(["config", "show", "--config-dir", str(tmp_path), "experiment=mine"]) == 0
    assert "steps: 123\n" in capsys.readouterr().out


def test_check_depends_on_the_world_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepared_data(tmp_path / "data")
    overrides = ["experiment=quickstart", f"data.path={data}", f"run.dir={tmp_path}/run"]
    assert main(["config", "check", "--world-size", "2", *overrides, "schedule.power_a=3"]) == 0
    out = capsys.readouterr().out
    assert "warning: schedule.power_a=3.0 has no effect with schedule.kind=cosine" in out
    assert "ok on 2 ranks, sha256 " in out
    assert main(["config", "check", "--world-size", "3", *overrides]) == 2
    assert "parallel.ep=2 must divide the world size 3" in capsys.readouterr().err
    assert main(["config", "check", "--world-size", "0", *overrides]) == 2
    assert "--world-size 0 must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_diff_of_overrides_files_and_run_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose([])))
    assert main(["config", "diff", "", str(tmp_path)]) == 0
    assert main(["config", "diff", str(tmp_path / "config.yaml"), str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["config", "diff", str(tmp_path), "optim.lr=0.5 model.moe.router.new=3"]) == 1
    assert capsys.readouterr().out == (
        "optim.lr: 0.001 -> 0.5\nmodel.moe.router.new: (absent) -> 3\n"
    )


def test_keys_lists_all_or_those_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "--json"]) == 0
    assert [info["key"] for info in json.loads(capsys.readouterr().out)] == list(
        leaf_types(RunConfig)
    )
    assert main(["config", "keys", "seq_len"]) == 0
    assert capsys.readouterr().out == (
        "data.seq_len: an integer; required\n"
        "    Tokens per training sample (inputs; targets are the same shifted by one).\n"
    )
    assert main(["config", "keys", "seqlen"]) == 2
    assert "no key has 'seqlen' in it: did you mean seq_len" in capsys.readouterr().err
