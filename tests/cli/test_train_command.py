"""`moesys train`: refuses before anything starts, and starts what it says."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from moesys.cli import main
from moesys.config.compose import compose, load_resolved
from moesys.train.exit_codes import STOPPED_EXIT_CODE
from tests.cli.processor_time import children_s
from tests.config.prepared import prepared_data

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}
SRUN = {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_JOB_ID": "3",
}
MPIRUN = {
    f"OMPI_COMM_WORLD_{name}": value
    for name, value in {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()
} | {"PMIX_NAMESPACE": "prterun-vm-1@1"}
LAUNCHERS = {"torchrun": TORCHRUN, "srun": SRUN, "mpirun": MPIRUN}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*LAUNCHER_VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)


def train(
    arguments: list[str], cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moesys", "train", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        timeout=120,
    )


@pytest.mark.alone  # torch's import is two of the three seconds
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.stepz=3", "optim.lr=x"], "did you mean train.steps?"),
        (["--nproc", "4", "parallel.ep=3"], "parallel.ep=3 must divide the world size 4"),
        (["model.moe.router.scaling=2"], "is not an option of moesys.moe.routers.TopKRouter"),
        (["data.path=nowhere"], "run moesys prep --input"),
    ],
)
def test_a_wrong_run_ends_within_three_seconds_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    data = prepared_data(tmp_path / "data")
    given = arguments if "data.path" in arguments[0] else [*arguments, f"data.path={data}"]
    before = children_s()
    done = train(given, tmp_path)
    used_s = children_s() - before
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert used_s < 3.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_misspelt_key_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom moesys.cli import main\n"
        "print(main(['train', '--nproc', '2', 'train.stepz=3']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


def test_rules_are_told_before_a_process_group_exists(tmp_path: Path) -> None:
    code = (
        "from moesys.cli import main\nimport torch.distributed\n"
        f"print(main(['train', 'optim.lr=0', 'data.path={prepared_data(tmp_path)}']), "
        "torch.distributed.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert "optim.lr=0.0 must be above 0" in done.stderr


def test_dry_run_prints_the_command_and_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared_data(tmp_path / "data")
    overrides = ["experiment=quickstart", f"data.path={data}", "run.name=a b"]
    cores = len(os.sched_getaffinity(0))
    assert main(["train", "--dry-run", "--nproc", "2", *overrides]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == (
        f"# would run: OMP_NUM_THREADS={max(1, cores // 2)} {sys.executable} "
        "-m torch.distributed.run --standalone --nproc-per-node 2 -m moesys train "
        f"experiment=quickstart data.path={data} 'run.name=a b'"
    )
    (tmp_path / "printed.yaml").write_text(out)
    assert load_resolved(tmp_path / "printed.yaml") == compose(overrides)

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert main(["train", "--dry-run", *overrides, "parallel.ep=1"]) == 0
    assert capsys.readouterr().out.startswith(
        f"# would run: OMP_NUM_THREADS=7 {sys.executable} -m moesys train experiment"
    )


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, ["--nproc", "0"], "--nproc 0 must be at least 1"),
        (TORCHRUN, ["--nproc", "2"], "torchrun has started the ranks"),
        (SRUN, ["--nproc", "2"], "srun has started the ranks"),
        (MPIRUN, ["--nproc", "2"], "mpirun has started the ranks"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, [], "SLURM_PROCID is not set"),
        ({"WORLD_SIZE": "4"}, [], "WORLD_SIZE=4 without RANK"),
    ],
)
def test_launchers_that_do_not_fit_are_refused(
    environment: dict[str, str],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_takes_its_launchers_world_size(
    launcher: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    data = prepared_data(tmp_path)
    overrides = ["experiment=quickstart", f"data.path={data}"]
    assert main(["train", "--dry-run", *overrides]) == 0
    assert f"# would train as one of 2 ranks that {launcher} started" in capsys.readouterr().out
    assert main(["train", "--dry-run", *overrides, "parallel.ep=4"]) == 2
    assert "must divide the world size 2" in capsys.readouterr().err


ROUTER = """
import torch

from moesys.moe.routers import TopKRouter


class MyRouter(TopKRouter):
    def __init__(self, *, temperature: float, **options) -> None:
        super().__init__(**options)
        print("built with temperature", temperature, flush=True)
"""


def test_two_ranks_train_with_a_router_of_the_users_and_stop_on_a_signal(tmp_path: Path) -> None:
    """Through torchrun: the folder, the overrides and the working folder reach every rank."""
    (tmp_path / "my_router.py").write_text(ROUTER)
    (tmp_path / "conf" / "router").mkdir(parents=True)
    (tmp_path / "conf" / "router" / "mine.yaml").write_text(
        "# @package model.moe.router\n_target_: my_router.MyRouter\ntemperature: 0.25\n"
    )
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} " * 300)
    prep = (
        f"prep --input {tmp_path}/text --output {tmp_path}/data --vocab-size 300 --val-fraction 0.2"
    )
    assert main(prep.split()) == 0
    overrides = (
        "router=mine parallel.ep=2 train.steps=2 schedule.warmup_steps=0 data.path=data "
        "data.seq_len=16 train.micro_batch_tokens=32 train.global_batch_tokens=64"
    )
    arguments = ["--nproc", "2", "--config-dir", "conf", *overrides.split()]
    done = train(arguments, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("built with temperature 0.25") >= 2
    config = load_resolved(tmp_path / "runs" / "moesys" / "config.yaml")
    assert config.model.moe.router.options == {"temperature": 0.25}

    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "moesys",
            "train",
            *arguments,
            "train.steps=100000",
            "run.name=long",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        lines = tmp_path / "runs" / "long" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (lines.is_file() and lines.read_text().count("\n") > 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED_EXIT_CODE
    assert "Traceback" not in errors
    assert list((tmp_path / "runs" / "long" / "checkpoints").glob("step_*"))


def test_the_exit_code_of_a_rank_is_passed_on(tmp_path: Path) -> None:
    leave = "import os\nif os.environ.get('RANK') == '1':\n    os._exit(7)\n"
    (tmp_path / "my_router.py").write_text(leave + ROUTER)
    data = prepared_data(tmp_path / "data")
    router = "model.moe.router._target_=my_router.MyRouter"
    options = ["model.moe.router.temperature=1", f"data.path={data}"]
    done = train(["--nproc", "2", router, *options], tmp_path)
    assert done.returncode == 7, done.stdout + done.stderr
    assert "rank 1 ended first, exit code 7" in done.stderr
