"""mpirun over two machines (namespaces of this one): its daemons are started by an agent that stands for ssh."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.network import FIRST, Network, made
from tests.train.launched import finish, overrides, records

MPIRUN = Path(sys.executable).parent / "mpirun"
AGENT = """#!/bin/bash
# As ssh: HOST COMMAND...
host=$1
shift
exec ip netns exec "$host" unshare --uts bash -c "hostname $host; $*"
"""
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun in the environment"),
]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with made() as network:
        yield network


def mpirun(network: Network, folder: Path, arguments: list[str], *exported: str) -> tuple[int, str]:
    """One rank on each machine; mpirun runs on the first, under the name that it has in the list of hosts."""
    agent = folder / "agent"
    agent.write_text(AGENT)
    agent.chmod(0o755)
    first, second = network.machines
    variables = [word for name in ("OMP_NUM_THREADS=1", *exported) for word in ("-x", name)]
    words = [
        *(str(MPIRUN), "-n", "2", "-H", f"{first}:1,{second}:1"),
        *("--prtemca", "plm_ssh_agent", str(agent), "--wdir", os.getcwd()),
        *(*variables, sys.executable, "-m", "moesys.train", *arguments),
    ]
    named = ["bash", "-c", f'hostname {first}; exec "$@"', "mpirun", *words]
    return finish(network.start(0, *named, **AS_ROOT), timeout_s=240)


def test_two_machines_train(network, tiny_data, tmp_path):
    meeting = [f"MASTER_ADDR={FIRST}", "MASTER_PORT=29573"]
    code, output = mpirun(network, tmp_path, overrides(tmp_path / "run", tiny_data), *meeting)
    assert code == 0, output
    (said,) = records(tmp_path / "run", "start")
    assert (said["launcher"], said["nodes"]) == ("mpirun", network.machines)
    assert records(tmp_path / "run", "stop")[0]["reason"] == "done"


def test_a_first_machine_whose_name_the_others_do_not_know(network, tiny_data, tmp_path):
    """MPI agrees on rank 0's name, which no name service has."""
    # A machine without a name service asks again: somebody may start it.
    arguments = overrides(tmp_path / "run", tiny_data, "train.start_timeout_s=20")
    code, output = mpirun(network, tmp_path, arguments)
    assert code != 0
    assert f"cannot resolve '{network.machines[0]}'" in output, output
    assert "set MASTER_ADDR to its address" in output
