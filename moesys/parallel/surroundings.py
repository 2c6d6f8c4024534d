"""What a launcher's variables leave open, found out on this machine and added as further variables.

MOESYS_NODE: the name of this machine. MOESYS_MASTER_ADDR: where the first node of a Slurm step is, if the name
service does not know it. MOESYS_MASTER_PORT, MOESYS_LOCAL_RANK, MOESYS_LOCAL_SIZE: agreed on by ranks of
mpirun through MPI. What is set already is left as it is.
"""

import re
import socket
import subprocess
from collections.abc import Mapping

from moesys.parallel.launcher import LaunchError, Place, asks_mpi, find_place

SCONTROL_S = 20.0
"""A busy controller may take some seconds to answer."""


def place_here(environ: Mapping[str, str]) -> Place:
    """This process's place. Collective where ranks of mpirun must ask MPI. Raises LaunchError."""
    known = {"MOESYS_NODE": socket.gethostname(), **environ}
    if asks_mpi(environ):
        known = {**_agreed_by_mpi(), **known}
    place = find_place(known)
    host = place.store_host
    if place.launcher == "srun" and host is not None and not _resolves(host):
        address = _address_in_slurm(host)
        if address is not None:
            return find_place({"MOESYS_MASTER_ADDR": address, **known})
    return place


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _address_in_slurm(node: str) -> str | None:
    """A node may have another address than its name says; only Slurm knows it then."""
    try:
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "node", node],
            capture_output=True,
            text=True,
            timeout=SCONTROL_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r" NodeAddr=(\S+)", shown.stdout)
    return found[1] if found else None


def _agreed_by_mpi() -> dict[str, str]:
    """Collective over all ranks of mpirun: rank 0's host and a free port of it; who shares this node."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            "mpirun started ranks on several nodes and MASTER_ADDR is not set: export MASTER_ADDR and "
            "MASTER_PORT (mpirun -x), a host and free port of rank 0's machine, or let MPI agree on them: "
            f"pip install 'moesys[mpi]' ({error})"
        ) from error
    world = MPI.COMM_WORLD
    here = world.Split_type(MPI.COMM_TYPE_SHARED)
    host, port = world.bcast((socket.getfqdn(), _free_port()) if world.rank == 0 else None)
    return {
        "MOESYS_MASTER_ADDR": host,
        "MOESYS_MASTER_PORT": str(port),
        "MOESYS_LOCAL_RANK": str(here.rank),
        "MOESYS_LOCAL_SIZE": str(here.size),
    }


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
