"""A process's place from its launcher's variables: as each launcher sets them, and with one of them spoilt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.parallel.hostlist import MOST_NAMES, expand_counts, expand_hosts
from moesys.parallel.interfaces import choose_interface
from moesys.parallel.launcher import FIRST_PORT, NUM_PORTS, LaunchError, asks_mpi, find_place
from moesys.parallel.topology import order_by_topology

# Rank 5 of 8 on 2 nodes, in the words of each launcher.
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "7d1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "MOESYS_NODE": "node2",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[01-02]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "70005",
    "SLURM_STEP_ID": "3",
    "SLURM_TOPOLOGY_ADDR": "n02",
    "SLURMD_NODENAME": "n02",
    "MOESYS_NODE": "login",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
    "PMIX_NAMESPACE": "prterun-vm-18840@1",
    "MASTER_ADDR": "10.0.0.1",
}
HYDRA = {
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "4",
    "MASTER_ADDR": "fd00::1",
    "MASTER_PORT": "29501",
}


def changed(environ: dict[str, str], changes: dict[str, str | None]) -> dict[str, str]:
    return {k: v for k, v in {**environ, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("environ", "launcher", "host", "port"),
    [
        (TORCHRUN, "torchrun", "node1", 29500),
        (SRUN, "srun", "n01", FIRST_PORT + (70005 * 8 + 3) % NUM_PORTS),
        (OPEN_MPI, "mpirun", "10.0.0.1", None),
        (HYDRA, "mpirun", "fd00::1", 29501),
    ],
)
def test_every_launcher_gives_the_same_place(environ, launcher, host, port):
    place = find_place(environ)
    assert (place.launcher, place.rank, place.world_size) == (launcher, 5, 8)
    assert (place.local_rank, place.ranks_per_node) == (1, 4)
    assert place.store_host == host
    assert place.store_port is not None
    assert FIRST_PORT <= place.store_port < FIRST_PORT + NUM_PORTS
    assert port is None or place.store_port == port


def test_what_only_one_launcher_tells():
    torchrun, srun = find_place(TORCHRUN), find_place(SRUN)
    assert torchrun.agent_has_store
    assert not srun.agent_has_store
    assert (torchrun.node, srun.node) == ("node2", "n02")
    assert srun.nodes == ("n01",) * 4 + ("n02",) * 4
    assert srun.topology == "n02"
    assert torchrun.job == "7d1"
    assert srun.job == "70005.3"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "3"},  # sbatch without srun
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"WORLD_SIZE": "1"},
    ],
)
def test_without_ranks_it_is_a_world_of_one(environ):
    place = find_place({**environ, "MOESYS_NODE": "here"})
    assert (place.launcher, place.rank, place.world_size) == ("single", 0, 1)
    assert place.node == "here"


def test_torchrun_goes_first_under_srun_and_mpirun():
    one_per_node = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    assert find_place(one_per_node | TORCHRUN).launcher == "torchrun"
    by_hand = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "1",
    }
    assert find_place(SRUN | by_hand).rank == 5
    assert find_place(OPEN_MPI | by_hand).rank == 5


def test_mpirun_goes_before_the_srun_that_started_its_daemons():
    daemons = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    assert find_place(daemons | OPEN_MPI).launcher == "mpirun"
    assert find_place(daemons | HYDRA).launcher == "mpirun"


@pytest.mark.parametrize("pmi", [{"PMI_RANK": "5", "PMI_SIZE": "8"}, {"PMIX_RANK": "5"}])
def test_srun_with_mpi_is_srun(pmi):
    assert find_place(SRUN | pmi) == find_place(SRUN)


def test_one_machine_under_mpirun_needs_no_address():
    changes = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "MASTER_ADDR": None}
    environ = changed(OPEN_MPI, changes)
    assert not asks_mpi(environ)
    place = find_place(environ)
    assert place.store_host == "127.0.0.1"
    assert place.store_port is not None
    assert asks_mpi(changed(environ, {"PMIX_NAMESPACE": None}))


def test_several_machines_ask_mpi_unless_told():
    unknown = changed(OPEN_MPI, {"MASTER_ADDR": None})
    assert asks_mpi(unknown)
    assert not asks_mpi(OPEN_MPI)
    assert not asks_mpi(SRUN)
    assert not asks_mpi(unknown | TORCHRUN)
    assert asks_mpi(changed(HYDRA, {"MPI_LOCALRANKID": None}))
    told = {"MOESYS_MASTER_ADDR": "n7", "MOESYS_MASTER_PORT": "4000"}
    place = find_place(unknown | told)
    assert (place.store_host, place.store_port) == ("n7", 4000)


def test_an_address_in_slurm_and_one_given():
    assert find_place(SRUN | {"MOESYS_MASTER_ADDR": "10.1.2.3"}).store_host == "10.1.2.3"
    given_ = {"MOESYS_MASTER_ADDR": "10.1.2.3", "MASTER_ADDR": "[fd00::5]", "MASTER_PORT": "4321"}
    place = find_place(SRUN | given_)
    assert (place.store_host, place.store_port) == ("fd00::5", 4321)


def test_neighbouring_jobs_and_steps_have_other_ports():
    ports = {
        find_place(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).store_port
        for job in range(500, 600)
        for step in range(8)
    }
    assert len(ports) == 800


@pytest.mark.parametrize(
    ("changes", "per_node", "nodes"),
    [
        ({}, 4, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "5,3", "SLURM_LOCALID": "0"}, None, 8),
        # In turns over the nodes: the topology will put them in order, without one they stay.
        ({"SLURM_LOCALID": "2"}, 4, 0),
        ({"SLURM_LOCALID": "2", "SLURM_TOPOLOGY_ADDR": None}, None, 0),
    ],
)
def test_ranks_per_node_only_where_neighbours_share_one(changes, per_node, nodes):
    place = find_place(changed(SRUN, changes))
    assert place.ranks_per_node == per_node
    assert len(place.nodes) == nodes


SPOILT = [
    (TORCHRUN, {"RANK": "8"}, "RANK=8 must be below WORLD_SIZE=8"),
    (TORCHRUN, {"RANK": "-1"}, "RANK=-1 must be a whole number"),
    (TORCHRUN, {"RANK": "five"}, "RANK=five must be a whole number"),
    (TORCHRUN, {"RANK": ""}, "RANK= must be a whole number"),
    (TORCHRUN, {"RANK": None}, "WORLD_SIZE=8 without RANK"),
    (TORCHRUN, {"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
    (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be at least 1"),
    (TORCHRUN, {"WORLD_SIZE": "8.0"}, "WORLD_SIZE=8.0 must be a whole number"),
    (TORCHRUN, {"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
    (TORCHRUN, {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be below LOCAL_WORLD_SIZE=4"),
    (TORCHRUN, {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not RANK=5 modulo LOCAL_WORLD_SIZE=4"),
    (TORCHRUN, {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 must be at most WORLD_SIZE=8"),
    (TORCHRUN, {"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    (TORCHRUN, {"MASTER_ADDR": ""}, "MASTER_ADDR= must be a name or an address"),
    (TORCHRUN, {"MASTER_ADDR": "tcp://n1"}, "MASTER_ADDR=tcp://n1 must be a name or an address"),
    (TORCHRUN, {"MASTER_ADDR": "n1:29500"}, "the port goes into MASTER_PORT"),
    (TORCHRUN, {"MASTER_PORT": None}, "MASTER_PORT is not set"),
    (TORCHRUN, {"MASTER_PORT": "0"}, "MASTER_PORT=0 must be at least 1"),
    (TORCHRUN, {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 must be below the number of ports"),
    (TORCHRUN, {"MASTER_PORT": "http"}, "MASTER_PORT=http must be a whole number"),
    (SRUN, {"SLURM_PROCID": None}, "SLURM_PROCID is not set"),
    (SRUN, {"SLURM_PROCID": "9"}, "SLURM_PROCID=9 must be below SLURM_STEP_NUM_TASKS=8"),
    (SRUN, {"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
    (SRUN, {"SLURM_LOCALID": "4"}, "SLURM_LOCALID=4 must be below the tasks of this node"),
    (SRUN, {"SLURM_NTASKS": "16"}, "SLURM_NTASKS=16 is not SLURM_STEP_NUM_TASKS=8"),
    (SRUN, {"SLURM_NODEID": "2"}, "SLURM_NODEID=2 must be below SLURM_STEP_NUM_NODES=2"),
    (SRUN, {"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS=x must be a whole number"),
    (SRUN, {"SLURM_STEP_NUM_NODES": None}, "SLURM_STEP_NUM_NODES is not set"),
    (SRUN, {"SLURM_STEP_NODELIST": "n[1-"}, "its brackets do not pair"),
    (SRUN, {"SLURM_STEP_NODELIST": "n[1-3]"}, "lists 3 hosts, SLURM_STEP_NUM_NODES=2"),
    (SRUN, {"SLURM_STEP_NODELIST": "n[1-999999999]"}, "stands for more than"),
    (SRUN, {"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is not set"),
    (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "4(x3)"}, "makes 12 tasks on 3 nodes"),
    (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "four"}, "is no list of tasks per node"),
    (SRUN, {"SLURM_JOB_ID": None}, "SLURM_JOB_ID is not set"),
    (OPEN_MPI, {"OMPI_COMM_WORLD_RANK": None}, "OMPI_COMM_WORLD_RANK is not set"),
    (OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": None}, "OMPI_COMM_WORLD_SIZE is not set"),
    (OPEN_MPI, {"OMPI_COMM_WORLD_RANK": "8"}, "must be below OMPI_COMM_WORLD_SIZE=8"),
    (OPEN_MPI, {"OMPI_COMM_WORLD_LOCAL_RANK": None}, "OMPI_COMM_WORLD_LOCAL_RANK is not set"),
    (OPEN_MPI, {"OMPI_COMM_WORLD_LOCAL_SIZE": "9"}, "must be at most OMPI_COMM_WORLD_SIZE=8"),
    (HYDRA, {"PMI_SIZE": None}, "PMI_SIZE is not set"),
    (HYDRA, {"MPI_LOCALRANKID": "7"}, "MPI_LOCALRANKID=7 must be below MPI_LOCALNRANKS=4"),
    (HYDRA, {"MASTER_PORT": None}, "MASTER_PORT is not set"),
    (
        SRUN,
        {**TORCHRUN, "SLURM_STEP_NUM_TASKS": "16"},
        "RANK=5 of WORLD_SIZE=8 contradicts SLURM_PROCID=5",
    ),
    (
        SRUN,
        {**TORCHRUN, "RANK": "6", "LOCAL_RANK": "2"},
        "start torchrun with one task of srun per node",
    ),
    (OPEN_MPI, {**TORCHRUN, "WORLD_SIZE": "4", "RANK": "1"}, "contradicts OMPI_COMM_WORLD_RANK=5"),
]


@pytest.mark.parametrize(("environ", "changes", "message"), SPOILT)
def test_a_spoilt_variable_is_named(environ, changes, message):
    spoilt = changed(environ, changes)
    with pytest.raises(LaunchError) as error:
        find_place(spoilt)
    assert message in str(error.value)
    assert ": " in str(error.value), "no fix"


def test_everything_wrong_is_said_at_once():
    with pytest.raises(LaunchError) as error:
        find_place(TORCHRUN | {"LOCAL_RANK": "x", "MASTER_PORT": "0", "WORLD_SIZE": "3"})
    lines = str(error.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == [
        "RANK",
        "LOCAL_WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_PORT",
    ]


def test_hosts_as_slurm_writes_them():
    assert expand_hosts("n[1-3,07],gpu-a[001-003]") == (
        *("n1", "n2", "n3", "n07"),
        *("gpu-a001", "gpu-a002", "gpu-a003"),
    )
    assert expand_hosts("login") == ("login",)
    assert expand_hosts("r[1-2]n[09-10]-ib") == ("r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib")
    assert expand_counts("4(x2),1,16(x1)") == (4, 4, 1, 16)


@pytest.mark.parametrize(
    "text", ["", "a,,b", "n[]", "n[1", "n1]", "n[3-1]", "n[a-b]", "n[[1]]", "a b, c", "n[1-2-3]"]
)
def test_no_host_list(text):
    with pytest.raises(ValueError, match="is no list of hosts"):
        expand_hosts(text)


def test_a_list_of_too_many_hosts_is_refused_before_it_is_made():
    for text in ("n[1-999999999]", "n[1-999999][1-999999]"):
        with pytest.raises(ValueError, match=f"more than {MOST_NAMES} hosts"):
            expand_hosts(text)
    with pytest.raises(ValueError, match="more than"):
        expand_counts("1(x999999999)")


RANGES = st.tuples(
    st.integers(0, 1200), st.integers(0, 12), st.integers(1, 5), st.booleans()
)  # first, more, width, written as a range
WORDS = st.tuples(st.sampled_from(["n", "gpu-a", "x.y", "r2d"]), st.lists(RANGES, max_size=4))


@given(st.lists(WORDS, min_size=1, max_size=5))
def test_any_host_list_is_expanded_in_order(words):
    texts, names = [], []
    for prefix, ranges in words:
        pieces = []
        for first, more, width, is_range in ranges:
            last = first + (more if is_range else 0)
            begin = str(first).zfill(width)
            pieces.append(f"{begin}-{last}" if is_range else begin)
            names += [f"{prefix}{str(n).zfill(len(begin))}" for n in range(first, last + 1)]
        texts.append(f"{prefix}[{','.join(pieces)}]" if pieces else prefix)
        names += [] if pieces else [prefix]
    assert expand_hosts(",".join(texts)) == tuple(names)


ADDRESSES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)).map(
        lambda a: f"s{a[0]}.t{a[0]}{a[1]}.n{a[0]}{a[1]}{a[2]}"
    ),
    min_size=1,
    max_size=40,
)


@given(ADDRESSES)
def test_topology_order_tears_nothing_apart(addresses):
    new_ranks = order_by_topology(addresses)
    assert sorted(new_ranks) == list(range(len(addresses)))
    assert new_ranks[0] == 0
    ordered = [""] * len(addresses)
    for address, new_rank in zip(addresses, new_ranks, strict=True):
        ordered[new_rank] = address
    for depth in (1, 2, 3):
        prefixes = [tuple(address.split(".")[:depth]) for address in ordered]
        groups = [p for i, p in enumerate(prefixes) if i == 0 or prefixes[i - 1] != p]
        assert len(groups) == len(set(groups)), "a switch or node is torn apart"
    # Ranks of one node keep their order; an order without tears stays.
    for address in set(addresses):
        own = [r for a, r in zip(addresses, new_ranks, strict=True) if a == address]
        assert own == sorted(own)
    assert order_by_topology(ordered) == tuple(range(len(ordered)))


def test_topology_of_uneven_depth():
    assert order_by_topology(["s0", "s0.n1", "s0", "s1.n2", "s0.n1"]) == (0, 2, 1, 4, 3)
    assert order_by_topology(["n1", "n2", "n1", "n2"]) == (0, 2, 1, 3)


TWO_NETWORKS = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["10.0.0.2", "fe80::2"],
    "ib0": ["10.9.0.2"],
    "docker0": ["172.17.0.1"],
    "usb0": ["fe80::9"],
}


@pytest.mark.parametrize(
    ("without", "own", "chosen"),
    [
        ((), "10.9.0.2", "ib0"),
        ((), "10.0.0.2", "eth0"),
        ((), "10.5.5.5", None),
        ((), "127.0.1.1", None),  # eth0 or ib0
        (("ib0",), "127.0.1.1", "eth0"),
        (("eth0", "ib0"), "::1", None),
    ],
)
def test_the_interface_towards_the_store(without, own, chosen):
    interfaces = {name: a for name, a in TWO_NETWORKS.items() if name not in without}
    assert choose_interface(interfaces, interfaces.keys(), own) == chosen


def test_an_interface_that_is_not_running_is_only_taken_for_its_address():
    assert choose_interface(TWO_NETWORKS, ["lo", "eth0"], "127.0.1.1") == "eth0"
    assert choose_interface(TWO_NETWORKS, ["lo"], "10.9.0.2") == "ib0"
