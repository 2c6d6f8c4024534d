"""The same tiny training on two ranks, started by each launcher: the losses are bitwise the same."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launch.slurm import SlurmCluster
from tests.train.launched import STEPS, finish, one_rank, overrides, records, start, wait_for_step

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ["-m", "moesys.train"]
MPIRUN = [str(Path(sys.executable).parent / "mpirun"), "-n", "2", "--oversubscribe"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
needs_mpi = pytest.mark.skipif(not Path(MPIRUN[0]).exists(), reason="no mpirun in the environment")


def run_all(commands: list[list[str]], changes: Mapping[str, str] | None = None) -> list[str]:
    """Run them at the same time to their good end; what each printed."""
    with ExitStack() as stack:
        processes = []
        for command in commands:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", **(changes or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.kill)
            processes.append(process)
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return outputs


def losses(run_dir: Path) -> list[tuple]:
    """Of every step, with no step told twice."""
    found = [(r["step"], r["loss"], r["grad_norm"]) for r in records(run_dir, "train")]
    assert [step for step, *_ in found] == list(range(1, STEPS + 1))
    return found


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def two_agents(tiny_data, tmp_path_factory) -> list[tuple]:
    """Static torchrun: two agents of one rank each, as on two nodes."""
    folder = tmp_path_factory.mktemp("runs") / "static"
    meeting = ["--nnodes=2", "--master-addr=localhost", f"--master-port={free_port()}"]
    nodes = [[*TORCHRUN, *meeting, f"--node-rank={node}", "--nproc-per-node=1"] for node in "01"]
    run_all([[*node, *TRAIN, *overrides(folder, tiny_data)] for node in nodes])
    (said,) = records(folder, "start")
    assert said["launcher"] == "torchrun"
    assert said["nodes"] == [socket.gethostname()]
    return losses(folder)


@pytest.mark.chaos
def test_elastic_torchrun(two_agents, tiny_data, tmp_path):
    meeting = ["--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    agent = [*TORCHRUN, *meeting, "--rdzv-id=elastic", "--nproc-per-node=2"]
    run_all([[*agent, *TRAIN, *overrides(tmp_path, tiny_data)]])
    assert losses(tmp_path) == two_agents


@needs_mpi
def test_mpirun(two_agents, tiny_data, tmp_path):
    run_all([[*MPIRUN, sys.executable, *TRAIN, *overrides(tmp_path, tiny_data)]], AS_ROOT)
    assert losses(tmp_path) == two_agents
    assert records(tmp_path, "start")[0]["launcher"] == "mpirun"


ASKS_MPI = """
import os
from moesys.parallel.launcher import asks_mpi
from moesys.parallel.surroundings import place_here
environ = {k: v for k, v in os.environ.items() if k != "PMIX_NAMESPACE"}
del environ["OMPI_COMM_WORLD_LOCAL_RANK"], environ["OMPI_COMM_WORLD_LOCAL_SIZE"]
assert asks_mpi(environ)
place = place_here(environ)
print("place", place.rank, place.local_rank, place.world_size, place.store_host, place.store_port)
"""


@needs_mpi
def test_ranks_of_mpirun_that_were_told_too_little_ask_mpi():
    (said,) = run_all([[*MPIRUN, sys.executable, "-c", ASKS_MPI]], AS_ROOT)
    places = sorted(line.split()[1:] for line in said.splitlines() if line.startswith("place"))
    assert [place[:3] for place in places] == [["0", "0", "2"], ["1", "1", "2"]]
    assert places[0][3:] == places[1][3:]
    assert places[0][3] == socket.getfqdn()


@pytest.mark.chaos
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_comes_back_in_place(rank, two_agents, tiny_data, tmp_path, monkeypatch):
    """torchrun starts the ranks again beside the store of the dead ones."""
    monkeypatch.setenv("PET_MAX_RESTARTS", "3")  # as --max-restarts=3
    process = start(2, overrides(tmp_path, tiny_data))
    wait_for_step(process, tmp_path, 3)
    one_rank(process, rank).kill()
    code, output = finish(process, 240)
    assert code == 0, output
    assert len(records(tmp_path, "start")) == 2
    assert losses(tmp_path) == two_agents


@pytest.mark.slurm
@pytest.mark.parametrize("options", [[], ["--mpi=pmi2"]])
def test_srun_alone(options, slurm: SlurmCluster, two_agents, tiny_data, tmp_path):
    """Two nodes of one task each; their names are known to Slurm alone."""
    run_srun(slurm, tmp_path, [*options, "--nodes=2", "--ntasks=2"], overrides(tmp_path, tiny_data))
    assert losses(tmp_path) == two_agents
    (said,) = records(tmp_path, "start")
    assert (said["launcher"], said["rank_order"]) == ("srun", "as started")
    assert said["nodes"] == ["n1", "n2"]


SRUN_MPI = """
import os
from mpi4py import MPI
from moesys.parallel.surroundings import place_here
place, world = place_here(os.environ), MPI.COMM_WORLD
stores = set(world.allgather((place.store_host, place.store_port)))
print("place", place.launcher, place.rank, place.world_size, world.rank, world.size, len(stores))
"""


@needs_mpi
@pytest.mark.slurm
def test_srun_with_pmix_is_the_world_of_mpi(slurm: SlurmCluster):
    """On one node: between virtual nodes of one machine Slurm's PMIx servers get in each other's way."""
    where = ["srun", "--mpi=pmix", "--nodes=1", "--ntasks=2"]
    if not slurm.run(*where, "echo", "ok", check=False):
        pytest.skip("Slurm finds no libpmix.so: apt-get install libpmix-dev")
    said = slurm.run(*where, sys.executable, "-c", SRUN_MPI, timeout_s=240.0, cwd=ROOT)
    places = sorted(line.split() for line in said.splitlines() if line.startswith("place"))
    assert places == [["place", "srun", rank, "2", rank, "2", "1"] for rank in "01"]


@pytest.mark.slurm
def test_srun_in_turns_over_the_nodes(slurm: SlurmCluster, tiny_data, tmp_path):
    where = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2"]
    given = ("parallel.ep=2", "train.micro_batch_tokens=128")
    for turns in ("block", "cyclic"):
        arguments = overrides(tmp_path / turns, tiny_data, *given)
        run_srun(slurm, tmp_path, [*where, f"--distribution={turns}"], arguments)
    block, cyclic = (records(tmp_path / turns, "start")[0] for turns in ("block", "cyclic"))
    assert (block["rank_order"], cyclic["rank_order"]) == ("as started", "by topology")
    assert losses(tmp_path / "block") == losses(tmp_path / "cyclic")


def run_srun(slurm: SlurmCluster, folder: Path, options: list[str], arguments: list[str]) -> None:
    command = ["srun", *options, "--export=ALL,OMP_NUM_THREADS=1"]
    slurm.run(*command, sys.executable, *TRAIN, *arguments, timeout_s=240.0, cwd=ROOT)
