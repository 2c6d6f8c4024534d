"""Where this process stands in a job: read from the variables that torchrun, mpirun or srun set.

Pure: variables in, integers and names out. What they leave open (an address that only the name service
knows, a port that only MPI can agree on) `surroundings` finds out and adds as variables before.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moesys.parallel.hostlist import expand_counts, expand_hosts

Launcher = Literal["torchrun", "mpirun", "srun", "single"]
FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""Where the store's port is if MASTER_PORT does not say: below what Linux uses for outgoing connections."""
STEPS_PER_JOB = 8
"""Steps of one Slurm job that have ports of their own."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process's place in a job, as its launcher gave it."""

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    ranks_per_node: int | None
    """None if it is not known, not the same on all nodes, or neighbours are not on one node."""
    node: str
    """The name of this node."""
    nodes: tuple[str, ...] = ()
    """The node of each rank, where the launcher tells."""
    num_nodes: int | None = None
    store_host: str | None = None
    """Name or address of the machine with the job's store: rank 0's, or that of torchrun's agent."""
    store_port: int | None = None
    agent_has_store: bool = False
    """Whether torchrun's agent serves the store; else rank 0 does."""
    job: str = ""
    """Tells this job from others that meet on the same port."""
    topology: str | None = None
    """Switches and node, `switch.switch.node`."""


class LaunchError(ValueError):
    """The launcher's variables are wrong, or contradict each other."""


def find_place(environ: Mapping[str, str]) -> Place:
    """This process's place, by RANK (torchrun), else OMPI_COMM_WORLD_* or PMI_* (mpirun), else SLURM_PROCID (srun).

    Raises:
        LaunchError: everything that is wrong, by variable, value, rule and fix.
    """
    read = _Variables(environ)
    if "RANK" in environ:
        place = _by_torchrun(read)
        _contradictions(read, place)
    elif environ.get("WORLD_SIZE", "1") != "1":
        read.complain("WORLD_SIZE", "without RANK", "export both, or start the ranks with torchrun")
        place = _alone(environ)
    elif _is_mpirun(environ):
        place = _by_mpirun(read)
    elif _is_srun(environ):
        place = _by_srun(read)
    else:
        place = _alone(environ)
    if read.problems:
        raise LaunchError("\n".join(read.problems))
    return place


def asks_mpi(environ: Mapping[str, str]) -> bool:
    """Whether ranks of mpirun must agree through MPI itself: on where the store is, or who shares a node."""
    if "RANK" in environ or not _is_mpirun(environ):
        return False
    names = _mpi_names(environ)
    if environ.get(names.local_rank) is None and "MOESYS_LOCAL_RANK" not in environ:
        return True
    if environ.get("MASTER_ADDR") or environ.get("MOESYS_MASTER_ADDR"):
        return False
    return environ.get(names.size) != environ.get(names.local_size) or not _mpi_job(environ)


def port_of(job: str, number: int | None = None) -> int:
    """A port for a job: by its number if it has one, so that neighbours differ; else by its name."""
    return FIRST_PORT + (zlib.crc32(job.encode()) if number is None else number) % NUM_PORTS


class _Variables:
    """Reads variables and collects what is wrong with them; a wrong one reads as the least that it may be."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.problems: list[str] = []

    def complain(self, name: str, rule: str, fix: str) -> None:
        given = self.environ.get(name)
        self.problems.append(f"{name if given is None else f'{name}={given}'} {rule}: {fix}")

    def integer(
        self,
        name: str,
        fix: str,
        *,
        least: int = 0,
        below: tuple[str, int] | None = None,
        default: int | None = None,
    ) -> int:
        """`below`: the name and value of what it must be less than. Without `default` it must be there."""
        text = self.environ.get(name)
        if text is None:
            if default is None:
                self.complain(name, "is not set", fix)
            return least if default is None else default
        if not (text.isascii() and text.isdigit()):
            self.complain(name, f"must be a whole number, at least {least}", fix)
            return least
        value = int(text)
        if value < least:
            self.complain(name, f"must be at least {least}", fix)
            return least
        if below is not None and value >= below[1] >= 1:
            self.complain(name, f"must be below {below[0]}={below[1]}", fix)
            return least
        return value

    def store(
        self, default_host: str | None, default_port: int | None
    ) -> tuple[str | None, int | None]:
        """MASTER_ADDR and MASTER_PORT if given; an IPv6 address may come in brackets."""
        host = self.environ.get("MASTER_ADDR", default_host)
        if host is not None:
            bare = host.removeprefix("[").removesuffix("]")
            if not bare or any(c.isspace() or c in "/[]" for c in bare) or bare.count(":") == 1:
                self.complain(
                    "MASTER_ADDR",
                    "must be a name or an address",
                    "name the machine of rank 0, without a scheme; the port goes into MASTER_PORT",
                )
            host = bare
        port = self.environ.get("MASTER_PORT")
        if port is None:
            return host, default_port
        fix = "choose a free one of rank 0's machine, such as 29500"
        return host, self.integer("MASTER_PORT", fix, least=1, below=("the number of ports", 65536))


def _alone(environ: Mapping[str, str]) -> Place:
    return Place(
        launcher="single",
        rank=0,
        world_size=1,
        local_rank=0,
        ranks_per_node=None,
        node=_node(environ),
        num_nodes=1,
    )


def _node(environ: Mapping[str, str]) -> str:
    for name in ("SLURMD_NODENAME", "MOESYS_NODE", "HOSTNAME"):
        if environ.get(name):
            return environ[name]
    return "localhost"


# torchrun, or RANK set by hand.


def _by_torchrun(read: _Variables) -> Place:
    environ, fix = read.environ, "torchrun sets it; by hand, export it for every rank"
    world_size = read.integer("WORLD_SIZE", fix, least=1)
    rank = read.integer("RANK", fix, below=("WORLD_SIZE", world_size))
    several = world_size > 1
    per_node = read.integer("LOCAL_WORLD_SIZE", fix, least=1, default=0) or None
    if per_node is not None and per_node > world_size:
        read.complain("LOCAL_WORLD_SIZE", f"must be at most WORLD_SIZE={world_size}", fix)
        per_node = None
    local_rank = read.integer(
        "LOCAL_RANK",
        fix,
        below=("LOCAL_WORLD_SIZE", per_node) if per_node else ("WORLD_SIZE", world_size),
        default=None if several else 0,
    )
    num_nodes = read.integer("GROUP_WORLD_SIZE", fix, least=1, default=0) or None
    if per_node is not None and num_nodes is not None and per_node * num_nodes != world_size:
        per_node = None  # nodes differ
    host, port = read.store(None, None)
    if several:
        for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)):
            if value is None:
                read.complain(name, "is not set", fix)
    if per_node is not None and rank % per_node != local_rank:
        read.complain(
            "LOCAL_RANK",
            f"is not RANK={rank} modulo LOCAL_WORLD_SIZE={per_node}",
            "give the ranks of a node consecutive numbers",
        )
    return Place(
        launcher="torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        ranks_per_node=per_node,
        node=_node(environ),
        num_nodes=num_nodes or (world_size // per_node if per_node else None),
        store_host=host,
        store_port=port,
        agent_has_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        job=environ.get("TORCHELASTIC_RUN_ID", ""),
    )


def _contradictions(read: _Variables, place: Place) -> None:
    """torchrun under srun or mpirun is started once on each node; RANK set by hand agrees with what they set."""
    environ = read.environ
    under = []
    if _is_srun(environ):
        nodes = environ.get("SLURM_STEP_NUM_NODES", "")
        under.append(("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", nodes))
    if "OMPI_COMM_WORLD_RANK" in environ:
        size, local = (environ.get(f"OMPI_COMM_WORLD_{n}", "") for n in ("SIZE", "LOCAL_SIZE"))
        nodes = size if local == "1" else ""
        under.append(("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", nodes))
    for launcher, rank_name, size_name, nodes in under:
        rank, size = environ.get(rank_name), environ.get(size_name)
        agrees = (rank, size) == (str(place.rank), str(place.world_size))
        is_agents = "TORCHELASTIC_RUN_ID" in environ and size == nodes
        if not agrees and not is_agents:
            read.complain(
                "RANK",
                f"of WORLD_SIZE={place.world_size} contradicts {rank_name}={rank} of {size_name}={size}",
                f"start torchrun with one task of {launcher} per node, or {launcher} alone with RANK unset",
            )


# mpirun.


@dataclass(frozen=True, kw_only=True)
class _MpiNames:
    rank: str
    size: str
    local_rank: str
    local_size: str


_OPEN_MPI = _MpiNames(
    rank="OMPI_COMM_WORLD_RANK",
    size="OMPI_COMM_WORLD_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
)
_HYDRA = _MpiNames(
    rank="PMI_RANK", size="PMI_SIZE", local_rank="MPI_LOCALRANKID", local_size="MPI_LOCALNRANKS"
)
"""MPICH, Intel MPI and others that are started by Hydra."""


def _mpi_names(environ: Mapping[str, str]) -> _MpiNames:
    is_open_mpi = _OPEN_MPI.rank in environ or _OPEN_MPI.size in environ
    return _OPEN_MPI if is_open_mpi else _HYDRA


def _is_mpirun(environ: Mapping[str, str]) -> bool:
    names = _mpi_names(environ)
    if names is _OPEN_MPI:
        return True
    rank = environ.get("PMI_RANK", environ.get("PMIX_RANK"))
    # srun --mpi sets these besides its own, which say more.
    return rank is not None and not (_is_srun(environ) and rank == environ.get("SLURM_PROCID"))


def _mpi_job(environ: Mapping[str, str]) -> str:
    return environ.get("PMIX_NAMESPACE", "")


def _by_mpirun(read: _Variables) -> Place:
    environ, names = read.environ, _mpi_names(read.environ)
    fix = "mpirun sets it; start the ranks with mpirun of Open MPI or MPICH, or with srun"
    size = read.integer(names.size, fix, least=1)
    rank = read.integer(names.rank, fix, below=(names.size, size))
    local_rank, local_size = names.local_rank, names.local_size
    if local_rank not in environ and "MOESYS_LOCAL_RANK" in environ:
        local_rank, local_size = "MOESYS_LOCAL_RANK", "MOESYS_LOCAL_SIZE"
    here = read.integer(local_size, fix, least=1)
    if here > size:
        read.complain(local_size, f"must be at most {names.size}={size}", fix)
    own = read.integer(local_rank, fix, below=(local_size, here))
    job = _mpi_job(environ)
    host = environ.get("MOESYS_MASTER_ADDR", "127.0.0.1" if here == size else None)
    agreed = port_of(job) if job else None
    if "MOESYS_MASTER_PORT" in environ:
        agreed = read.integer(
            "MOESYS_MASTER_PORT", "unset it: ranks of mpirun agree on one", least=1
        )
    host, port = read.store(host, agreed)
    if size > 1 and host is not None and port is None:
        read.complain("MASTER_PORT", "is not set", "export it with MASTER_ADDR for every rank")
    return Place(
        launcher="mpirun",
        rank=rank,
        world_size=size,
        local_rank=own,
        ranks_per_node=here if size % here == 0 and rank % here == own else None,
        node=_node(environ),
        num_nodes=1 if here == size else None,
        store_host=host,
        store_port=port,
        job=job,
    )


# srun.


def _is_srun(environ: Mapping[str, str]) -> bool:
    """Only srun sets SLURM_STEP_*; a batch script that starts one process itself is a world of one."""
    return environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def _by_srun(read: _Variables) -> Place:
    environ = read.environ
    fix = "srun sets it; start the ranks with srun, and export no SLURM_ variable by hand"
    size = read.integer("SLURM_STEP_NUM_TASKS", fix, least=1)
    rank = read.integer("SLURM_PROCID", fix, below=("SLURM_STEP_NUM_TASKS", size))
    num_nodes = read.integer("SLURM_STEP_NUM_NODES", fix, least=1)
    node_id = read.integer("SLURM_NODEID", fix, below=("SLURM_STEP_NUM_NODES", num_nodes))
    ntasks = read.integer("SLURM_NTASKS", fix, least=1, default=size)
    if ntasks != size:
        read.complain("SLURM_NTASKS", f"is not SLURM_STEP_NUM_TASKS={size}", fix)
    hosts = _listed(read, "SLURM_STEP_NODELIST", num_nodes, fix)
    counts = _counted(read, num_nodes, size, fix)
    own_count = counts[node_id] if counts else size
    local_rank = read.integer(
        "SLURM_LOCALID",
        fix,
        below=("the tasks of this node in SLURM_STEP_TASKS_PER_NODE", own_count),
    )
    job_id = read.integer("SLURM_JOB_ID", fix)
    step_id = read.integer("SLURM_STEP_ID", fix, default=0)
    number = job_id * STEPS_PER_JOB + step_id % STEPS_PER_JOB
    first = environ.get("MOESYS_MASTER_ADDR", hosts[0] if hosts else None)
    host, port = read.store(first, port_of("", number))
    topology = environ.get("SLURM_TOPOLOGY_ADDR") or None
    # Ranks started in turns over the nodes (--distribution=cyclic) are put in order by the topology.
    is_in_blocks = bool(counts) and sum(counts[:node_id]) + local_rank == rank
    is_even = len(set(counts)) == 1 and (is_in_blocks or topology is not None)
    return Place(
        launcher="srun",
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        ranks_per_node=counts[0] if is_even else None,
        node=environ.get("SLURMD_NODENAME") or (hosts[node_id] if hosts else _node(environ)),
        nodes=tuple(h for h, n in zip(hosts, counts, strict=False) for _ in range(n))
        if is_in_blocks
        else (),
        num_nodes=num_nodes,
        store_host=host,
        store_port=port,
        job=f"{job_id}.{step_id}",
        topology=topology,
    )


def _listed(read: _Variables, name: str, num_nodes: int, fix: str) -> tuple[str, ...]:
    if name not in read.environ:
        read.complain(name, "is not set", fix)
        return ()
    try:
        hosts = expand_hosts(read.environ[name])
    except ValueError as error:
        read.complain(name, f"cannot be read ({error})", fix)
        return ()
    if len(hosts) != num_nodes:
        read.complain(name, f"lists {len(hosts)} hosts, SLURM_STEP_NUM_NODES={num_nodes}", fix)
        return ()
    return hosts


def _counted(read: _Variables, num_nodes: int, size: int, fix: str) -> tuple[int, ...]:
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in read.environ:
        read.complain(name, "is not set", fix)
        return ()
    try:
        counts = expand_counts(read.environ[name])
    except ValueError as error:
        read.complain(name, f"cannot be read ({error})", fix)
        return ()
    if len(counts) != num_nodes or sum(counts) != size:
        read.complain(
            name,
            f"makes {sum(counts)} tasks on {len(counts)} nodes, SLURM_STEP_NUM_TASKS={size} and "
            f"SLURM_STEP_NUM_NODES={num_nodes} say otherwise",
            fix,
        )
        return ()
    return counts
