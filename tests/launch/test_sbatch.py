"""The batch script: the options it asks for, names of any kind, and lines that shellcheck accepts."""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moesys.config.compose import search_path
from moesys.config.errors import ConfigError
from moesys.launch.cluster import ClusterConfig, read_cluster
from moesys.launch.sbatch import Component, Job, batch_script

ROOT = Path(__file__).resolve().parents[2]
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
)
JOB = Job(
    name="a",
    folder=Path("/runs/a"),
    code=Path("/runs/a/code"),
    working_folder=Path("/project"),
    python="/venv/bin/python",
    python_path=(Path("/runs/a/code"), Path("/project")),
    data=(Path("/data/d"),),
)
ODD = 'it\'s $HOME "quoted" \\ `x` 100% #1'


def cluster(name: str = "local", *changes: str) -> ClusterConfig:
    return read_cluster(name, changes, search_path(None))


def script(facts: ClusterConfig, nodes: int = 2, job: Job = JOB) -> str:
    return batch_script([Component(cluster=facts, nodes=nodes)], job)


def options(text: str) -> list[str]:
    return [
        line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")
    ]


def test_what_a_job_needs_to_come_back_is_asked_for() -> None:
    asked = options(script(cluster("local", "cluster.grace_s=90"), nodes=3))
    for option in (
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR2@90",
        "--output=/runs/a/slurm-%j.log",
        "--nodes=3",
        "--ntasks-per-node=2",
        "--chdir=/project",
    ):
        assert option in asked
    assert not [o for o in asked if o.startswith(("--partition", "--gpus", "--mem", "--array"))]


def test_every_fact_of_a_cluster_is_said() -> None:
    text = script(
        cluster(
            "h100_pyxis",
            "cluster.account=me",
            "cluster.qos=high",
            "cluster.modules=[a/1, b]",
            "cluster.setup=['ulimit -l unlimited']",
            'cluster.env={X: "a b"}',
            "cluster.sbatch=['--comment=two words', --exclusive]",
        )
    )
    assert {
        *("--partition=batch", "--account=me", "--qos=high", "--time=4-00:00:00", "--mem=0"),
        *("--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=14", "--exclusive"),
        '--comment="two words"',
    } <= set(options(text))
    lines = text.splitlines()
    order = [
        "module load a/1 b",
        "ulimit -l unlimited",
        ". /runs/a/code/launch/env/nccl.env",
        "export GLOO_SOCKET_IFNAME='eth0'",
        "export NCCL_SOCKET_IFNAME='=eth0'",
        "export NCCL_IB_HCA='=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7'",
        "export X='a b'",
        ". /runs/a/code/launch/job.sh",
    ]
    assert [line for line in lines if line in order] == order
    assert "export OMP_NUM_THREADS=14" in lines
    mounts = "/scratch:/scratch,/project:/project,/runs/a:/runs/a,/runs/a/code:/runs/a/code,/data/d:/data/d"
    assert f"--container-mounts={mounts}" in text
    assert "--container-image=/images/moesys.sqsh" in text
    assert lines[-1] == '  python3 -m moesys.train --config "$run_folder/config.yaml"'


def test_a_preflight_runs_as_the_ranks_do_and_before_them() -> None:
    text = script(cluster("local", "cluster.preflight=true"))
    before, after = text.split('run_job "$run_folder" \\\n')
    srun = "  srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task=1 \\\n"
    assert 'preflight /runs/a/job.sbatch "$run_folder" \\\n' + srun in before
    assert after.startswith(srun)
    assert "doctor" not in script(cluster())


def test_how_often_ranks_are_started_again_is_said() -> None:
    assert "python=/venv/bin/python restarts=5\n" in script(cluster("local", "cluster.restarts=5"))


def test_apptainer_wraps_the_interpreter() -> None:
    text = script(cluster("apptainer_ib"))
    assert "  apptainer exec --nv --bind /scratch:/scratch --bind /project:/project " in text
    assert "--pwd /project /images/moesys.sif" in text
    on_cpu = cluster("apptainer_ib", "cluster.gpus_per_node=0", "cluster.gpu_memory_gib=null")
    assert "--nv" not in script(on_cpu)
    assert "nccl.env" not in script(on_cpu)


def test_what_is_not_known_is_not_said() -> None:
    text = script(cluster())
    assert "module load" not in text
    assert "SOCKET_IFNAME" not in text
    assert "--mem=8G" in options(script(cluster("local", "cluster.memory_gib_per_node=8")))


@example(ODD)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0"), min_size=1).map("x".__add__)
)
def test_a_folder_of_any_name_reaches_the_ranks_whole(name: str) -> None:
    folder = Path("/runs") / name.replace("/", "_")
    text = script(cluster(), job=replace(JOB, folder=folder, name=name))
    assigned = next(line for line in text.split("\n") if line.startswith("run_folder="))
    assert shlex.split(assigned) == [f"run_folder={folder}"]
    (output,) = [o for o in text.split("\n") if o.startswith("#SBATCH --output=")]
    value = output.partition("=")[2]
    if value.startswith('"'):
        value = value[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    named = value.removesuffix("/slurm-%j.log")
    assert named.replace("%%", "%") == str(folder)
    assert named.count("%") == 2 * str(folder).count("%")


def test_a_sweep_is_an_array_whose_tasks_take_a_line_each() -> None:
    text = script(cluster(), job=replace(JOB, folder=Path("/runs/a.sweep"), sweep_runs=6))
    assert "--array=0-5" in options(text)
    assert "--output=/runs/a.sweep/slurm-%A_%a.log" in options(text)
    assert 'run_folder=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" /runs/a.sweep/runs.txt)' in text


def test_a_heterogeneous_job_is_one_world_over_its_components() -> None:
    few = replace(cluster(), name="few", partition="big", ranks_per_node=1)
    parts = [Component(cluster=few, nodes=1), Component(cluster=cluster(), nodes=4)]
    text = batch_script(parts, JOB)
    first, second = text.split("#SBATCH hetjob\n")
    assert {"--nodes=1", "--partition=big", "--job-name=a"} <= set(options(first))
    assert {"--nodes=4", "--ntasks-per-node=2", "--requeue"} <= set(options(second))
    assert "--job-name=a" not in options(second)
    assert "--het-group=0,1" in text


def test_components_that_cannot_share_a_world_are_refused() -> None:
    other = replace(cluster(), name="other", cpus_per_task=9, network_interface="ib0")
    parts = [Component(cluster=c, nodes=1) for c in (cluster(), other)]
    with pytest.raises(ConfigError) as raised:
        batch_script(parts, replace(JOB, sweep_runs=2))
    assert [p.key for p in raised.value.problems] == [
        *("cluster.cpus_per_task", "cluster.network_interface", "--sweep")
    ]
    with pytest.raises(ConfigError, match="must be one line"):
        script(cluster(), job=replace(JOB, name="a\nb"))


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("sweep_runs", [None, 3])
@pytest.mark.parametrize("name", ["local", "h100_pyxis", "apptainer_ib"])
def test_shellcheck_accepts_it(name: str, sweep_runs: int | None, tmp_path: Path) -> None:
    odd = replace(JOB, name=ODD, folder=Path("/runs", ODD), code=Path("/runs", ODD, "code"))
    text = script(cluster(name, "cluster.modules=[a]"), job=replace(odd, sweep_runs=sweep_runs))
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    # SC2016: a dollar in the name of a folder is not meant to expand.
    command = [str(SHELLCHECK), "--exclude=SC2016", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_variable_for_nccl_says_why() -> None:
    lines = (ROOT / "launch" / "env" / "nccl.env").read_text().splitlines()
    settings = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert settings
    for number in settings:
        assert lines[number - 1].startswith("# "), lines[number]
