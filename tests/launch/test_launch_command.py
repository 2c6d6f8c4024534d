"""`moesys launch`: what it prints without a cluster, and what it refuses before anything is queued."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moesys.cli import main
from moesys.launch.status import write_status
from tests.config.prepared import prepared_data


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    data = prepared_data(tmp_path / "data")
    batch = "train.global_batch_tokens=16384"
    return ["launch", "cluster=local", "experiment=quickstart", batch, f"data.path={data}"]


def test_dry_run_prints_the_plan_and_the_script_and_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "nodes=2", "--dry-run", "cluster.partition=p"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# 1 run of 4 ranks on 2 nodes of local\n")
    assert f"# run folder: {tmp_path}/runs/quickstart\n" in out
    assert "#SBATCH --partition=p\n" in out
    assert f"python={sys.executable} restarts=3\n" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_sweep_is_checked_point_by_point(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["--sweep", "optim.lr=1e-3,3e-3", "run.seed=1,2,3"]
    assert main([*words, "--dry-run", *sweep, "nodes=2"]) == 0
    out = capsys.readouterr().out
    assert "# 6 runs of 4 ranks on 2 nodes of local" in out
    assert f"# run folder: {tmp_path}/runs/quickstart-5" in out
    assert "#SBATCH --array=0-5" in out
    assert main([*words, "--dry-run", "--sweep", "optim.lr=1e-3,0"]) == 2
    assert "optim.lr=0: configuration: optim.lr=0.0 must be above 0" in capsys.readouterr().err
    assert main([*words, "--dry-run", "run.dir=runs/x", "--sweep", "run.seed=1,2"]) == 2
    assert "is the folder of 2 runs of the sweep" in capsys.readouterr().err


def test_two_clusters_are_one_world(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = [word.replace("cluster=local", "cluster=local+local") for word in words]
    assert main([*given, "--dry-run", "nodes=1+3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# 1 run of 8 ranks on 1 node of local and 3 nodes of local\n")
    assert "#SBATCH hetjob" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["cluster=locl"], "did you mean local?"),
        (["cluster="], "cluster= is missing"),
        (["nodes=0"], "nodes=0 must be a number of nodes, at least 1"),
        (["nodes=1+2"], "for each of cluster=local"),
        (["cluster.grace_s=1"], "cluster.grace_s=1 must be at least 10"),
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["parallel.ep=3"], "parallel.ep=3 must divide the world size 2"),
        (["nodes=3", "parallel.ep=4"], "parallel.ep=4 must divide the world size 6"),
        (["data.path=nowhere"], "run moesys prep --input"),
        (["--sweep", "optim.lr=interval(0,1)"], "must be values that can be listed"),
    ],
)
def test_what_is_wrong_is_refused_on_the_login_node(
    words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *more]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_plan_that_cannot_fit_is_refused_before_it_is_queued(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared_data(tmp_path / "data", train_tokens=10**9)
    large = [
        *(words[0], "cluster=h100_pyxis", "nodes=64", "model=qwen3_30b_a3b", words[-1]),
        *("train.micro_batch_tokens=4096", "data.seq_len=4096", "parallel.ep=8"),
        f"train.global_batch_tokens={4096 * 512}",
    ]
    assert main([*large, "--dry-run", "parallel.zero=0"]) == 2
    said = capsys.readouterr().err
    assert "which must be at most the 79.6 GiB of a GPU" in said
    assert "parallel.zero=" in said
    assert not Path("runs").exists()
    assert main([*large, "--dry-run", "parallel.zero=3", "train.recompute=layer"]) == 0
    assert "# memory of the fullest rank, by formula: " in capsys.readouterr().out


SAYS_WHETHER_TORCH = (
    "import sys; from moesys.cli import main; code = main(sys.argv[1:]); "
    "print('torch' in sys.modules); sys.exit(code)"
)
"""Was imported, after the command."""


def test_64_nodes_whose_memory_is_impossible_are_refused_without_torch(
    words: list[str], tmp_path: Path
) -> None:
    """On the login node, before Slurm is asked for; with what is said to help, the plan is printed."""
    prepared_data(tmp_path / "data", train_tokens=10**9)
    large = [
        *("cluster=h100_pyxis", "nodes=64", "model=qwen3_30b_a3b", words[-1]),
        *("data.seq_len=4096", "train.micro_batch_tokens=4096", "parallel.ep=8"),
        f"train.global_batch_tokens={4096 * 512}",
    ]
    command = [sys.executable, "-c", SAYS_WHETHER_TORCH, "launch", *large]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PATH": "/nowhere"}, timeout=240
    )
    assert (done.returncode, done.stdout) == (2, "False\n")
    said = re.search(
        r"memory needs (\d+\.\d) GiB on a rank \(.*which must be at most the 79\.6 GiB of a GPU: use (\S+=\S+) ",
        done.stderr,
    )
    assert said is not None, done.stderr
    assert float(said[1]) > 79.6
    assert not Path("runs").exists()
    assert main(["launch", *large, said[2], "--dry-run"]) == 0


def test_memory_decides_how_many_experts_a_rank_may_copy_without_torch(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared_data(tmp_path / "data", train_tokens=10**9)
    large = [
        *("launch", "cluster=h100_pyxis", "nodes=64", "model=qwen3_30b_a3b", words[-1]),
        *("data.seq_len=4096", "train.micro_batch_tokens=4096", "train.recompute=layer"),
        *("parallel.ep=128", f"train.global_batch_tokens={4096 * 512}", "--dry-run"),
        *("placement=balanced", "placement.copies=null"),
    ]
    command = [sys.executable, "-c", SAYS_WHETHER_TORCH, *large, "cluster.gpu_memory_gib=20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert "which must be at most the 20 GiB of a GPU" in done.stderr
    assert main(large) == 0
    said = capsys.readouterr().out
    (copies,) = map(int, re.findall(r"# placement.copies, as many as fit: (\d+)", said))
    (memory_gib,) = map(float, re.findall(r"by formula: (\d+\.\d) GiB", said))
    assert 1 <= copies < 127
    assert memory_gib <= 79.6
    given = [word for word in large if word != "placement.copies=null"]
    assert main([*given, f"placement.copies={copies + 1}"]) == 2
    assert "which must be at most the 79.6 GiB" in capsys.readouterr().err
    assert main([*words, "--dry-run", "parallel.ep=2", *large[-2:]]) == 2
    assert "cluster.gpu_memory_gib" in capsys.readouterr().err


def test_without_sbatch_the_other_ways_are_named(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(words) == 2
    assert "sbatch is not on this machine: launch from a login node" in capsys.readouterr().err


def test_a_run_that_waits_or_runs_is_not_launched_again(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesys.launch.slurm.has", lambda command: True)
    write_status("runs/quickstart", "queued", job_id="12345678")
    assert main(words) == 2
    assert "runs/quickstart is queued as job 12345678" in capsys.readouterr().err
