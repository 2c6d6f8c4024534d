"""`moesys config`: show, check, diff and keys."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moesys.cli import main
from moesys.config.build import leaf_types, to_dict
from moesys.config.compose import compose, load_resolved, to_yaml
from moesys.config.data_schema import SourceConfig
from moesys.config.dispatch_schema import CandidateConfig
from moesys.config.schema import RunConfig
from moesys.parallel.dims import parallel_dims
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
    listed = [info["key"] for info in json.loads(capsys.readouterr().out)]
    by_name = {"data.sources": SourceConfig, "dispatch.candidates": CandidateConfig}
    expected: list[str] = []
    for key in leaf_types(RunConfig):
        inner = leaf_types(by_name[key]) if key in by_name else None
        expected += [key] if inner is None else [f"{key}.NAME.{name}" for name in inner]
    assert listed == expected
    assert main(["config", "keys", "seq_len"]) == 0
    assert capsys.readouterr().out == (
        "data.seq_len: an integer; required\n"
        "    Tokens per training sample (inputs; targets are the same shifted by one).\n"
    )
    assert main(["config", "keys", "seqlen"]) == 2
    assert "no key has 'seqlen' in it: did you mean seq_len" in capsys.readouterr().err


LAYOUT = [
    *("--world-size", "16", "--ranks-per-node", "4", "train.global_batch_tokens=8192"),
    *("parallel.tp=2", "parallel.ep=8", "parallel.zero=3", "parallel.dp_shard=4"),
]


def test_mesh_shows_the_equations_the_grids_and_the_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "mesh", *LAYOUT]) == 0
    equations, dense, experts, groups, ranks, note = capsys.readouterr().out.split("\n\n")
    assert equations.splitlines() == [
        "world 16 = pp 1 * dp 8 * cp 1 * tp 2",
        "stage 16 = dp 8 * cp 1 * tp 2 = edp 2 * ep 8 * etp 1",
        "dp 8 = dp_replicate 2 * dp_shard 4, edp 2 = edp_replicate 2 * edp_shard 1",
    ]
    assert dense.splitlines()[:4] == [
        "tokens and dense parameters, tp across:",
        "node  dp_replicate  dp_shard  :   0   1",
        "   0             0         0  :   0   1",
        "                 0         1  :   2   3",
    ]
    assert experts.splitlines() == [
        "experts, ep across:",
        "node  edp_replicate  :  0  1   2   3     4   5   6   7",
        " 0-1              0  :  0  1   2   3 |   4   5   6   7",
        " 2-3              1  :  8  9  10  11 |  12  13  14  15",
    ]
    assert "tp:             8 groups of 2:  0-1, 2-3, ..., 14-15\n" in groups
    assert "dp_replicate:   8 groups of 2:  0+8, 1+9, ..., 7+15  (8 across nodes)" in groups
    assert ranks.splitlines()[0].split() == [
        *("rank", "node", "dp_replicate", "dp_shard", "tp", "edp_replicate", "ep")
    ]
    assert ranks.splitlines()[1 + 13].split() == ["13", "3", "1", "2", "1", "1", "5"]
    assert note.startswith("note: 2 of 2 ep groups (ranks 0-7, 8-15) lie on several nodes of 4")


def test_mesh_as_json_is_what_the_run_will_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "mesh", "--json", *LAYOUT]) == 0
    facts = json.loads(capsys.readouterr().out)
    config = compose([word for word in LAYOUT if "=" in word])
    dims = parallel_dims(config.parallel, 16)
    axes = dims.dense_axes | dims.expert_axes
    assert facts["degrees"] == {"dp": 8, "edp": 2, **axes}
    assert facts["groups"] == {axis: dims.groups(axis) for axis in axes}
    assert facts["groups_across_nodes"]["tp"] == []
    assert facts["groups_across_nodes"]["ep"] == [list(range(8)), list(range(8, 16))]
    assert facts["ranks"] == [
        {"rank": rank, "node": rank // 4, **dims.coordinates(rank)} for rank in range(16)
    ]
    assert facts["warnings"] == []
    assert len(facts["notes"]) == 1


def test_mesh_shows_what_shares_no_node_and_what_is_slow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ["parallel.tp=2", "parallel.etp=4", "--world-size", "8"]
    assert main(["config", "mesh", *overrides]) == 0
    assert "nodes" not in capsys.readouterr().out
    assert main(["config", "mesh", *overrides, "--ranks-per-node", "3"]) == 0
    out = capsys.readouterr().out
    assert " 0-1             1  :  2 |  3\n" in out
    assert "\nwarning: parallel.tp=2: 1 of 4 tp groups (ranks 2-3) lie on several nodes of 3" in out
    assert "\nwarning: parallel.etp=4: 2 of 2 etp groups" in out


def test_a_long_axis_goes_on_in_the_next_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--world-size", "40", "--ranks-per-node", "8", "train.global_batch_tokens=40960"]
    assert main(["config", "mesh", *words]) == 0
    dense = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert len(dense) == 2 + 4
    assert " ".join(dense[3].split()) == "1-2 10 : 10 11 12 13 14 15 | 16 17 18 19"


def test_mesh_refuses_what_a_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "mesh", "--world-size", "4", "parallel.ep=3"]) == 2
    assert "parallel.ep=3 must divide the world size 4" in capsys.readouterr().err
    assert main(["config", "mesh", "--ranks-per-node", "0"]) == 2
    assert "--ranks-per-node 0 must be at least 1" in capsys.readouterr().err
    assert main(["config", "mesh"]) == 0
    assert "world 1 = pp 1 * dp 1 * cp 1 * tp 1" in capsys.readouterr().out


def test_mesh_starts_without_torch() -> None:
    code = (
        "import sys\nfrom moesys.cli import main\n"
        "assert main(['config', 'mesh', '--world-size', '4', 'parallel.tp=2']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_check_knows_nodes_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data.path={prepared_data(tmp_path / 'data')}", f"run.dir={tmp_path}/run"]
    words += ["--world-size", "2", "parallel.tp=2"]
    assert main(["config", "check", *words, "--ranks-per-node", "1"]) == 0
    assert "warning: parallel.tp=2: 1 of 1 tp groups (ranks 0-1)" in capsys.readouterr().out
    assert main(["config", "check", *words, "--ranks-per-node", "2"]) == 0
    assert "warning" not in capsys.readouterr().out
