"""launch/run.sh: what it starts on one machine and under srun, really meeting with two of it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_SH = ROOT / "launch" / "run.sh"
WORDS = ["experiment=quickstart"]


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


TORCHRUN = "-m moesys.train.torchrun"
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
        # A rank was killed, and torchrun has no restart left.
        (["--relaunch", "1"], "exit 137", 2, 137),
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
    deadline = time.monotonic() + 60
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


ELASTIC = (
    "--nnodes 1:2 --rdzv-backend c10d --rdzv-endpoint {endpoint} --rdzv-id moesys{job} "
    "--rdzv-conf keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=3 --max-restarts 20"
)


def test_machines_that_may_be_lost_and_come(programs: Path) -> None:
    words = ["--nodes", "1:2", "--nproc", "2", "a=b"]
    done = launch(programs, "--meeting", "m0:29400", *words)
    options = ELASTIC.format(endpoint="m0:29400", job="")
    assert done.stdout == f"OMP=4 {TORCHRUN} {options} --nproc-per-node 2 -m moesys.train a=b\n"
    done = launch(programs, *words, **SLURM, SLURM_NODEID="1")
    options = ELASTIC.format(endpoint="localhost:20005", job="70005")
    assert done.stdout == f"OMP=4 {TORCHRUN} {options} --nproc-per-node 2 -m moesys.train a=b\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "2"], "as MIN:MAX, got '2'"),
        (["--nodes", "4:2"], "as MIN:MAX, got '4:2'"),
        (["--nodes", "1:2"], "--nodes 1:2 needs --meeting HOST:PORT"),
        (["--nodes", "1:2", "--meeting", "m0"], "--meeting needs HOST:PORT"),
        (["--meeting", "m0:29400"], "--meeting m0:29400 without --nodes"),
    ],
)
def test_words_that_say_too_little_of_the_machines(
    programs: Path, words: list[str], said: str
) -> None:
    done = launch(programs, *words, "a=b")
    assert done.returncode == 2
    assert said in done.stderr


def test_several_tasks_on_a_node_are_the_ranks(programs: Path) -> None:
    several = SLURM | {"SLURM_STEP_NUM_TASKS": "8"}
    done = launch(programs, "a=b", **several, SLURM_NODEID="0")
    assert done.stdout == "OMP=2 -m moesys.train a=b\n"
    done = launch(programs, "--nproc", "2", **several, SLURM_NODEID="0")
    assert done.returncode == 2
    assert "--nproc 2 beside 8 tasks of srun on 2 nodes" in done.stderr
    done = launch(programs, "--nodes", "1:2", **several, SLURM_NODEID="0")
    assert done.returncode == 2
    assert "--nodes 1:2 beside 8 tasks of srun on 2 nodes" in done.stderr


def test_an_sbatch_script_without_srun_is_one_machine(programs: Path) -> None:
    assert "--standalone" in launch(programs, SLURM_NNODES="2", SLURM_NODEID="0").stdout


RANK = """
import json, os, pathlib, signal, sys, time
rank = os.environ["RANK"]
def stop(number, _):
    time.sleep(1)  # it saves, whatever comes meanwhile
    pathlib.Path(f"stopped{rank}").write_text(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, stop)
note = [os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], sys.argv[1:]]
pathlib.Path(f".rank{rank}").write_text(json.dumps(note))
os.replace(f".rank{rank}", f"rank{rank}")
with open("starts", "a") as file:
    file.write(f"{os.environ.get('MOESYS_NODE')} of {os.environ['WORLD_SIZE']}\\n")
lost = pathlib.Path("lost")
while "run.dir=end" not in sys.argv:
    time.sleep(0.05)
    if lost.exists():
        lost.unlink()
        sys.exit(76)
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder in which `-m moesys.train` is a stand-in: it notes its rank, then waits to be stopped, or cut off."""
    package = tmp_path / "job" / "moesys"
    (package / "train").mkdir(parents=True)
    # All else is found in the real package.
    for folder, real in (("", "moesys"), ("train", "moesys/train")):
        (package / folder / "__init__.py").write_text(f"__path__.append({str(ROOT / real)!r})\n")
    (package / "__init__.py").write_text(
        (package / "__init__.py").read_text() + "__version__ = ''\n"
    )
    (package / "train" / "__main__.py").write_text(RANK)
    return tmp_path / "job"


def test_two_nodes_meet(programs: Path, job: Path) -> None:
    changes = SLURM | {"PYTHON": sys.executable, "SLURM_JOB_ID": str(os.getpid())}
    nodes = [
        subprocess.Popen(
            ["bash", str(RUN_SH), "--nproc", "1", *WORDS, "run.dir=end"],
            cwd=job,
            env=environment(programs, changes | {"SLURM_NODEID": node}),
        )
        for node in ("0", "1")
    ]
    assert [node.wait(timeout=90) for node in nodes] == [0, 0]
    assert [json.loads((job / f"rank{rank}").read_text()) for rank in (0, 1)] == [
        ["2", "0", [*WORDS, "run.dir=end"]]
    ] * 2


@pytest.mark.parametrize("options", [[], ["--relaunch", "0"]])
@pytest.mark.parametrize("signals", [["SIGUSR1"], ["SIGTERM"] * 3])
def test_a_signal_reaches_the_ranks(
    programs: Path, job: Path, options: list[str], signals: list[str]
) -> None:
    process = subprocess.Popen(
        ["bash", str(RUN_SH), "--nproc", "2", *options, *WORDS],
        cwd=job,
        env=environment(programs, {"PYTHON": sys.executable}),
    )
    wait_for_line(job / "starts", 2)
    for name in signals:
        process.send_signal(signal.Signals[name])
        time.sleep(0.3)
    assert process.wait(timeout=60) == 75
    assert [(job / f"stopped{rank}").read_text() for rank in (0, 1)] == [signals[0]] * 2


@pytest.mark.chaos
def test_a_lost_machine_is_done_without_until_it_comes_back(programs: Path, job: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    quick = "keep_alive_interval=1,keep_alive_max_attempt=7,last_call_timeout=1"
    words = ["--nproc", "1", "--relaunch", "0", "--nodes", "1:2", "--meeting", f"127.0.0.1:{port}"]
    starts = job / "starts"

    def start(node: str) -> subprocess.Popen[bytes]:
        told = {"PYTHON": sys.executable, "MOESYS_NODE": node, "PET_RDZV_CONF": quick}
        return subprocess.Popen(
            ["bash", str(RUN_SH), *words, *WORDS], cwd=job, env=environment(programs, told)
        )

    with ExitStack() as stack:
        first = start("a")  # the machine of the meeting
        stack.callback(kill_all, first)
        wait_for_line(starts, 1)
        for others in (1, 2):
            second = start("b")
            stack.callback(kill_all, second)
            wait_for_line(starts, 3 * others)
            if others == 1:
                kill_all(second)
                (job / "lost").touch()  # as the watch of the other rank finds it
                wait_for_line(starts, 4)
        for process in (first, second):
            process.terminate()
        assert [process.wait(timeout=60) for process in (first, second)] == [75, 75]
    told = starts.read_text().splitlines()
    both = ["a of 2", "b of 2"]
    assert [told[0], sorted(told[1:3]), told[3], sorted(told[4:])] == [
        "a of 1",
        both,
        "a of 1",
        both,
    ]


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to it and its ranks, as a machine that loses power."""
    if process.poll() is None:
        agent = psutil.Process(process.pid)
        for victim in [agent, *agent.children(recursive=True)]:
            victim.kill()
    process.wait()
