"""launch/run.sh: what it starts on one machine and under srun, really meeting with two of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

RUN_SH = Path(__file__).resolve().parents[2] / "launch" / "run.sh"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of stand-ins, first on PATH: an interpreter that prints its arguments, no GPU, 8 cores."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, body in {
        "show": 'echo "OMP=$OMP_NUM_THREADS $*"',
        "nproc": "echo 8",
        "nvidia-smi": "exit 9",
        "scontrol": """case "$*" in
          "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
          "--oneliner show node n1") echo "NodeName=n1 Arch=x86_64 NodeAddr=localhost NodeHostName=h" ;;
        esac""",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def environment(programs: Path, changes: Mapping[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_"))}
    return kept | {
        "PATH": f"{programs}:{kept['PATH']}",
        "PYTHON": str(programs / "show"),
        **changes,
    }


def launch(programs: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(RUN_SH), *words],
        env=environment(programs, changes),
        capture_output=True,
        text=True,
    )


# By default it takes SIGUSR1 and SIGUSR2 for its own end, without a word to the ranks.
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
TORCHRUN = f"-m torch.distributed.run {SIGNALS}"
SLURM = {
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "70005",
}


def test_one_machine(programs: Path) -> None:
    done = launch(programs, "--nproc", "4", "experiment=quickstart", "run.name=a b")
    assert done.stdout == (
        f"OMP=2 {TORCHRUN} --standalone --nproc-per-node 4 "
        "-m moesys.train experiment=quickstart run.name=a b\n"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "OMP=4 .* 2 -m"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "OMP=2 .* 4 -m"),
        ({"OMP_NUM_THREADS": "3"}, "OMP=3 "),
    ],
)
def test_ranks_and_threads_by_default(
    programs: Path, changes: dict[str, str], expected: str
) -> None:
    done = launch(programs, "experiment=quickstart", **changes)
    for part in expected.split(" .* "):
        assert part in done.stdout


def test_ranks_by_default_are_the_gpus(programs: Path) -> None:
    (programs / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: A\\nGPU 2: A\\n'\n")
    assert "--nproc-per-node 3 " in launch(programs, "experiment=quickstart").stdout
    (programs / "nproc").write_text("#!/bin/sh\necho 2\n")
    assert launch(programs, "experiment=quickstart").stdout.startswith("OMP=1 ")


def test_a_wrong_number_of_ranks_is_refused(programs: Path) -> None:
    done = launch(programs, "--nproc", "two", "experiment=quickstart")
    assert done.returncode == 2
    assert "--nproc needs a number of ranks, got 'two'" in done.stderr


def stand_in(programs: Path, body: str) -> Path:
    """An interpreter that adds a line to the file returned each time it is started, and then does `body`."""
    starts = programs / "starts"
    (programs / "show").write_text(f"#!/bin/sh\necho start >> {starts}\n{body}\n")
    starts.touch()
    return starts


@pytest.mark.parametrize(
    ("words", "body", "num_starts", "code"),
    [
        ([], "[ $(wc -l < ${0%show}starts) -ge 3 ] || kill -9 $$", 3, 0),
        ([], "kill -9 $$", 4, 137),
        (["--relaunch", "1"], "kill -SEGV $$", 2, 139),
        (["--relaunch", "0"], "kill -9 $$", 1, 137),
        # Its own word: done, ranks failed, wrong words, saved on request, asked to end.
        *(([], f"exit {code}", 1, code) for code in (0, 1, 2, 75)),
        ([], "kill -TERM $$", 1, 143),
    ],
)
def test_torchrun_is_started_again_only_if_it_was_killed(
    programs: Path, words: list[str], body: str, num_starts: int, code: int
) -> None:
    starts = stand_in(programs, body)
    done = launch(programs, *words, "--nproc", "2", "a=b")
    # Without a script between them it is the signal itself.
    assert done.returncode in (code, 128 - code), done.stderr
    assert len(starts.read_text().splitlines()) == num_starts
    assert done.stderr.count("started again, ") == num_starts - 1


def test_nothing_is_started_again_under_srun(programs: Path) -> None:
    starts = stand_in(programs, "kill -9 $$")
    assert launch(programs, "a=b", **SLURM, SLURM_NODEID="0").returncode == -signal.SIGKILL
    assert len(starts.read_text().splitlines()) == 1


def test_a_wrong_number_of_relaunches_is_refused(programs: Path) -> None:
    done = launch(programs, "--relaunch", "always", "a=b")
    assert done.returncode == 2
    assert "got 'always'" in done.stderr


@pytest.mark.parametrize("how", ["asked", "killed"])
def test_the_end_of_the_script_is_the_end_of_torchrun(programs: Path, how: str) -> None:
    """Asked to stop, it starts nothing again, whatever becomes of torchrun; killed, torchrun is asked to stop."""
    if how == "killed" and shutil.which("setpriv") is None:
        pytest.skip("setpriv lets torchrun hear of it")
    heard = programs / "heard"
    # A shell runs a trap when its child has ended.
    body = f"trap 'echo TERM >> {heard}; kill -9 $$' TERM\necho $$ > {heard}\nwhile :; do sleep 0.1; done"
    starts = stand_in(programs, body)
    process = subprocess.Popen(["bash", str(RUN_SH), "a=b"], env=environment(programs, {}))
    wait_for_line(heard, 1)
    process.send_signal(signal.SIGTERM if how == "asked" else signal.SIGKILL)
    assert process.wait(timeout=30) == (137 if how == "asked" else -signal.SIGKILL)
    wait_for_line(heard, 2)
    assert heard.read_text().splitlines()[1:] == ["TERM"]
    assert len(starts.read_text().splitlines()) == 1


def wait_for_line(path: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_under_srun_every_node_names_the_same_meeting_point(programs: Path) -> None:
    for node in ("0", "1"):
        done = launch(programs, "--nproc", "2", "a=b", **SLURM, SLURM_NODEID=node)
        assert done.stdout == (
            f"OMP=4 {TORCHRUN} --nnodes 2 --node-rank {node} --master-addr localhost "
            "--master-port 20005 --nproc-per-node 2 -m moesys.train a=b\n"
        )


def test_several_tasks_on_a_node_are_the_ranks(programs: Path) -> None:
    several = SLURM | {"SLURM_STEP_NUM_TASKS": "8"}
    done = launch(programs, "a=b", **several, SLURM_NODEID="0")
    assert done.stdout == "OMP=2 -m moesys.train a=b\n"
    done = launch(programs, "--nproc", "2", **several, SLURM_NODEID="0")
    assert done.returncode == 2
    assert "--nproc 2 beside 8 tasks of srun on 2 nodes" in done.stderr


def test_an_sbatch_script_without_srun_is_one_machine(programs: Path) -> None:
    assert "--standalone" in launch(programs, SLURM_NNODES="2", SLURM_NODEID="0").stdout


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder in which `-m moesys.train` is a stand-in: it notes its rank, then waits to be stopped."""
    package = tmp_path / "job" / "moesys"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train.py").write_text(
        "import json, os, pathlib, signal, sys, time\n"
        "rank = os.environ['RANK']\n"
        "def stop(*_):\n"
        "    pathlib.Path(f'stopped{rank}').touch()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "note = [os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'], sys.argv[1:]]\n"
        "pathlib.Path(f'.rank{rank}').write_text(json.dumps(note))\n"
        "os.replace(f'.rank{rank}', f'rank{rank}')\n"
        "time.sleep(0 if 'end' in sys.argv else 60)\n"
    )
    return tmp_path / "job"


def test_two_nodes_meet(programs: Path, job: Path) -> None:
    changes = SLURM | {"PYTHON": sys.executable, "SLURM_JOB_ID": str(os.getpid())}
    nodes = [
        subprocess.Popen(
            ["bash", str(RUN_SH), "--nproc", "1", "end"],
            cwd=job,
            env=environment(programs, changes | {"SLURM_NODEID": node}),
        )
        for node in ("0", "1")
    ]
    assert [node.wait(timeout=90) for node in nodes] == [0, 0]
    assert [json.loads((job / f"rank{rank}").read_text()) for rank in (0, 1)] == [
        ["2", "0", ["end"]]
    ] * 2


def test_a_signal_reaches_the_ranks(programs: Path, job: Path) -> None:
    process = subprocess.Popen(
        ["bash", str(RUN_SH), "--nproc", "2"],
        cwd=job,
        env=environment(programs, {"PYTHON": sys.executable}),
    )
    deadline = time.monotonic() + 60
    while not ((job / "rank0").exists() and (job / "rank1").exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert (job / "stopped0").exists()
    assert (job / "stopped1").exists()
