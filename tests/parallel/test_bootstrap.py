"""Joining and leaving a run: ranks that meet, and each way in which they do not."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moesys.parallel import meeting
from moesys.parallel.bootstrap import process_group
from moesys.parallel.job_store import open_store
from moesys.parallel.launcher import Place, find_place
from moesys.parallel.meeting import meet
from moesys.parallel.roll_call import Expected, Facts, judge, spell
from moesys.parallel.surroundings import place_here
from tests.parallel.test_launcher import SPOILT, SRUN, changed

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC_", "SLURM_")
LAUNCHER_PREFIXES += ("OMPI_", "PMI_", "PMIX_", "MPI_", "MOESYS_")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def place(rank: int, world_size: int, port: int, host: str = "127.0.0.1", **more) -> Place:
    return Place(
        launcher="srun",
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        ranks_per_node=None,
        node="here",
        store_host=host,
        store_port=port,
        **more,
    )


def test_a_process_without_a_launcher_is_a_world_of_one():
    with process_group("cpu", 30.0) as process:
        assert (process.rank, process.world_size, process.backend) == (0, 1, "gloo")
        assert (process.launcher, process.node) == ("single", socket.gethostname())
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0]
    assert not dist.is_initialized()


def test_a_rank_without_a_gpu_is_refused_before_the_group_exists():
    alone = replace(find_place({}), local_rank=torch.cuda.device_count())
    with (
        pytest.raises(ValueError, match=r"set train\.device=cpu"),
        process_group("cuda", 30.0, place=alone),
    ):
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize(("environ", "changes", "message"), SPOILT)
def test_a_spoilt_environment_is_refused_before_a_process_group(
    environ, changes, message, monkeypatch
):
    for name, value in changed(environ, changes).items():
        monkeypatch.setenv(name, value)
    # The last resort of ranks that mpirun told too little; it would start MPI in this process.
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    began = time.monotonic()
    with pytest.raises(ValueError), process_group("cpu", 30.0):
        pass
    assert time.monotonic() - began < 3.0
    assert not dist.is_initialized()


def test_mpirun_on_several_machines_without_mpi4py_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    told = {
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    with pytest.raises(ValueError, match=r"export MASTER_ADDR and\s+MASTER_PORT.*moesys\[mpi\]"):
        place_here(told)


def test_the_address_of_a_node_that_only_slurm_knows(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "--oneliner show node virtual-1" ] || exit 1\n'
        'echo "NodeName=virtual-1 Arch=x86_64 NodeAddr=10.4.5.6 NodeHostName=h"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environ = SRUN | {"SLURM_STEP_NODELIST": "virtual-[1-2]"}
    assert place_here(environ).store_host == "10.4.5.6"
    assert place_here(environ | {"MASTER_ADDR": "192.0.2.7"}).store_host == "192.0.2.7"


# The store.


def test_a_port_in_use_is_named_with_the_fix():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port}: another program listens.*MASTER_PORT"):
            open_store(place(0, 2, port), 5.0)


def test_nobody_at_the_store():
    with socket.socket() as silent:  # has the port, and does not listen
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"found nobody at 127\.0\.0\.1:{port}.*start_timeout_s=0\.5"
        ):
            open_store(place(1, 2, port), 0.5)


def test_a_name_that_nobody_knows():
    with pytest.raises(ValueError, match=r"cannot resolve 'no-such-host\.invalid'.*MASTER_ADDR"):
        open_store(place(1, 2, 29500, "no-such-host.invalid"), 0.5)


def test_no_route():
    with pytest.raises(ValueError, match=r"has no route to the job's store at \[fe80::1\]:29500"):
        open_store(place(1, 2, 29500, "fe80::1"), 0.5)


def test_a_master_address_that_is_not_rank_0s():
    port = free_port()
    with pytest.raises(ValueError, match="must be a name or address of rank 0's machine"):
        # 100::/64 is where packets are discarded.
        open_store(place(0, 2, port, "100::1"), 1.0)


# The meeting, on threads that share a store.


def facts(rank: int, **changes) -> Facts:
    given = {
        "rank": rank,
        "node": f"n{rank // 2}",
        "python": "3.11.2",
        "torch": "2.13.0",
        "moesys": "0.1.0",
        "device": "cpu",
        "address": "10.0.0.1",
        "interface": "eth0",
        "topology": None,
    }
    return Facts(**given | changes)


def expected(world_size: int, within_s: float = 20.0, **more) -> Expected:
    return Expected(
        **{"world_size": world_size, "nodes": (), "ranks_per_node": None, "within_s": within_s}
        | more
    )


def gather(store, attendants):
    """`meet` of all attendants (facts, settings, expected) at once: for each its meeting or its error."""
    results = [None] * len(attendants)

    def attend(number):
        try:
            results[number] = meet(store, *attendants[number])
        except ValueError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=attend, args=(n,)) for n in range(len(attendants))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_ranks_meet_and_know_each_others_nodes():
    met = gather(dist.HashStore(), [(facts(r), "same", expected(4)) for r in range(4)])
    assert [m.verdict.nodes for m in met] == [["n0", "n0", "n1", "n1"]] * 4
    assert not any(m.verdict.problems or m.verdict.is_reordered for m in met)


def test_every_start_beside_one_store_is_a_generation_of_its_own():
    store = dist.HashStore()
    for generation in (1, 2, 3):
        # Someone of a start before asked, and was killed before rank 0 answered.
        store.add("asked", 1)
        met = gather(store, [(facts(r), "same", expected(3)) for r in (2, 0, 1)])
        assert [m.generation for m in met] == [generation] * 3
        assert not met[0].store.check(["lifeline"]), "it sees what the start before wrote"
        met[0].store.set("lifeline", str(generation))
        assert met[1].store.get("lifeline") == str(generation).encode()


def test_another_configuration_names_the_lines():
    given = ["lr: 0.1\nsteps: 3", "lr: 0.1\nsteps: 3", "lr: 0.2\nsteps: 3"]
    said = gather(dist.HashStore(), [(facts(r), given[r], expected(3)) for r in range(3)])
    assert all("rank 2 on n1: composed another configuration than rank 0" in s for s in said)
    assert "  rank 0: lr: 0.1\n  here:   lr: 0.2" in said[0]
    assert "steps" not in said[0]


def test_a_missing_rank_is_named_with_its_node():
    nodes = ("n0", "n0", "n1", "n1")
    given = expected(4, within_s=0.5, nodes=nodes)
    said = gather(dist.HashStore(), [(facts(r), "", given) for r in (0, 1, 3)])
    text = "1 of 4 ranks did not come within train.start_timeout_s=0.5: rank 2 on n1."
    assert all(text in s for s in said)


def test_a_missing_rank_0():
    said = gather(dist.HashStore(), [(facts(1), "", expected(2, within_s=0.3))])
    assert "rank 0 did not come within train.start_timeout_s=0.3" in said[0]


def test_a_rank_that_comes_twice_ends_the_wait_at_once():
    began = time.monotonic()
    given = [(facts(r), "", expected(3, within_s=60.0)) for r in (0, 1, 1)]
    said = gather(dist.HashStore(), given)
    assert all("rank 1 came twice" in s for s in said)
    assert time.monotonic() - began < 30.0


def test_a_rank_of_another_world():
    given = [(facts(r), "", expected(size)) for r, size in enumerate((3, 3, 8))]
    said = gather(dist.HashStore(), given)
    assert "rank 2 on n1 was started as one of 8 ranks, rank 0 as one of 3" in str(said[0])


def test_everything_that_differs_is_said_at_once():
    present = {
        0: facts(0),
        1: facts(1, torch="2.12.1"),
        2: facts(2, python="3.12.0", problem="local rank 0 has no GPU"),
        3: facts(3, device="NVIDIA H200", clock_ahead_s=-7.5, node="n9"),
    }
    verdict = judge(present, expected(5, ranks_per_node=2), [])
    text = "\n".join(verdict.problems)
    assert "rank 4 (all of node 2, counted from 0)" in text
    assert "rank 2 on n1: local rank 0 has no GPU" in text
    assert (
        "torch must be the same on all ranks, but is 2.13.0 on ranks 0, 2-3 (n0, n1, n9), " in text
    )
    assert "2.12.1 on rank 1 (n0): install one version on all nodes" in text
    assert "python must be the same" in text
    assert "device must be the same" in text
    assert "moesys must" not in text
    assert len(verdict.problems) == 5
    assert "n9 is 7.5 s behind" in verdict.warnings[0]


def test_ranks_in_turns_over_nodes_are_put_in_order():
    given = [facts(r, topology=f"s0.n{r % 2}", node=f"n{r % 2}") for r in range(4)]
    met = gather(dist.HashStore(), [(f, "", expected(4)) for f in given])
    assert met[0].verdict.new_ranks == [0, 2, 1, 3]
    assert met[3].verdict.nodes == ["n0", "n0", "n1", "n1"]
    assert met[0].verdict.is_reordered
    one_unknown = {r: replace(f, topology=None) if r == 2 else f for r, f in enumerate(given)}
    assert not judge(one_unknown, expected(4), []).is_reordered


def test_versions_that_differ_are_told_on_every_rank():
    given = [facts(r, torch="2.12.1" if r == 2 else "2.13.0") for r in range(3)]
    given[1] = replace(given[1], python="3.12.0")
    said = gather(dist.HashStore(), [(f, "", expected(3)) for f in given])
    text = "torch must be the same on all ranks, but is 2.13.0 on ranks 0-1 (n0), 2.12.1 on rank 2 (n1)"
    assert text in said[0]
    # The others say the first and how many more there are.
    assert all(("python must be the same" in s) and "(and 1 more, in rank 0" in s for s in said[1:])


def test_a_clock_that_is_ahead_is_told_when_ranks_meet(monkeypatch):
    """On one rank of two, whose thread has the time of a machine without NTP."""

    class Clocks:
        monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

        @staticmethod
        def time() -> float:
            is_wrong = threading.current_thread().name.startswith("wrong")
            return time.time() + (9.0 if is_wrong else 0.0)

    monkeypatch.setattr(meeting, "time", Clocks)
    store, met = dist.HashStore(), []
    threads = [
        threading.Thread(
            target=lambda r=r: met.append(meet(store, facts(r, node=f"n{r}"), "", expected(2))),
            name=name,
        )
        for r, name in enumerate(("right", "wrong"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (warning,) = met[0].verdict.warnings
    said = re.search(r"n1 is (\d\.\d) s ahead", warning)
    assert said is not None
    assert float(said[1]) == pytest.approx(9.0, abs=1.5)
    assert "start NTP or chrony there" in warning
    assert not met[0].verdict.problems


def test_measured_nodes_are_put_in_order_unless_one_is_unknown():
    # n0 and n2 share a switch, whatever the launcher says of it.
    measured = {"n0": "a.n0", "n1": "b.n1", "n2": "a.n2", "n3": "b.n3"}
    given = [facts(r, node=f"n{r}", topology=f"s.n{r}") for r in range(4)]
    present = dict(enumerate(given))
    verdict = judge(present, expected(4, measured=measured), [])
    assert verdict.new_ranks == [0, 2, 1, 3]
    assert verdict.is_measured
    del measured["n3"]
    verdict = judge(present, expected(4, measured=measured), [])
    assert not verdict.is_reordered
    assert "MOESYS_LINKS says nothing of n3: ranks are not put in order" in verdict.warnings[0]


def test_several_machines_are_told_from_one():
    one = {r: facts(r) for r in range(2)}
    assert not judge(one, expected(2), []).has_several_machines
    two = one | {1: facts(1, address="10.0.0.2")}
    assert judge(two, expected(2), []).has_several_machines


def test_ranks_are_spelt_short():
    assert spell([3]) == "rank 3"
    assert spell([0, 1, 2, 5]) == "ranks 0-2, 5"
    assert spell(list(range(0, 40, 2))) == "ranks 0, 2, 4, 6, 8, ..., 38"


# In processes of their own.

JOB = """
import os
import torch.distributed as dist
from moesys.parallel.bootstrap import process_group
from moesys.parallel.measured import addresses_in
with process_group("cpu", 60.0, 60.0, measured=addresses_in(os.environ)) as process:
    ranks = [None] * process.world_size
    dist.all_gather_object(ranks, process.rank)
    clone = dist.distributed_c10d._get_default_store().clone()
    clone.set("x", "y")
    print(process.rank, ranks, *process.nodes, process.rank_order, process.launcher, flush=True)
"""


def start_ranks(environs: list[dict[str, str]]) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    with ExitStack() as stack:
        ranks = []
        for environ in environs:
            rank = subprocess.Popen(
                [sys.executable, "-c", JOB],
                env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ},
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(rank.kill)
            ranks.append(rank)
        return [rank.communicate(timeout=120)[0] for rank in ranks]


@pytest.mark.parametrize("host", ["localhost", "[::1]"])
def test_processes_meet_by_name_and_by_ipv6(host):
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(free_port())}
    said = start_ranks([told | {"RANK": r, "LOCAL_RANK": r} for r in "01"])
    name = socket.gethostname()
    assert said == [f"{r} [0, 1] {name} {name} as started torchrun\n" for r in "01"]


def test_srun_in_turns_over_two_nodes_trains_in_order():
    """Variables as Slurm sets them; the real one is in tests/launch."""
    told = {
        "SLURM_NTASKS": "4",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_JOB_ID": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    environs = []
    for rank in range(4):
        local, node = divmod(rank, 2)
        own = {"PROCID": rank, "LOCALID": local, "NODEID": node, "TOPOLOGY_ADDR": f"s.n{node + 1}"}
        environs.append(told | {f"SLURM_{k}": str(v) for k, v in own.items()})
    said = start_ranks(environs)
    assert said == [f"{r} [0, 1, 2, 3] n1 n1 n2 n2 by topology srun\n" for r in (0, 2, 1, 3)]


def test_ranks_are_put_in_order_by_what_their_nodes_measured(tmp_path):
    """Four nodes of one rank: the first and third share a switch, the second and fourth another."""
    nodes = ("n1", "n2", "n3", "n4")
    links = [
        {"nodes": [a, b], "gbit_per_s": 100.0 if is_near else 20.0, "round_trip_us": 10.0}
        for a, b, is_near in (
            *(("n1", "n2", False), ("n1", "n3", True), ("n1", "n4", False)),
            *(("n2", "n3", False), ("n2", "n4", True), ("n3", "n4", False)),
        )
    ]
    (tmp_path / "links.json").write_text(json.dumps({"links": links}))
    told = {
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "MOESYS_LINKS": str(tmp_path / "links.json"),
    }
    said = start_ranks([told | {"RANK": str(r), "MOESYS_NODE": nodes[r]} for r in range(4)])
    assert said == [f"{r} [0, 1, 2, 3] n1 n3 n2 n4 as measured torchrun\n" for r in (0, 2, 1, 3)]
