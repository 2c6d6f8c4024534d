"""Two machines of their own networks (namespaces of this one, which root may make): routes and interfaces are real."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORT = "29571"
JOB = """
import os
import sys
import torch
import torch.distributed as dist
from moesys.parallel.bootstrap import process_group
try:
    with process_group("cpu", 60.0, float(sys.argv[1])) as process:
        total = torch.ones(1)
        dist.all_reduce(total)
        print("sum", total.item(), os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)
except ValueError as error:
    print("refused:", error, flush=True)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[str, str]]:
    """Names of two namespaces, joined by a fast network 10.77.0.0/24, fd77::/64 and a management network 10.78.0.0/24."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces are made by root, with iproute2")
    names = tuple(f"moesys{os.getpid()}{side}" for side in "ab")
    with ExitStack() as stack:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr}")
            stack.callback(ip, "netns", "delete", name)
            ip("-n", name, "link", "set", "lo", "up")
        for interface, network in (("fast0", "10.77.0"), ("mgmt0", "10.78.0")):
            ends = ["link", "add", interface, "netns", names[0], "type", "veth"]
            ip(*ends, "peer", "name", interface, "netns", names[1])
            for number, name in enumerate(names, start=1):
                ip("-n", name, "address", "add", f"{network}.{number}/24", "dev", interface)
                ip("-n", name, "link", "set", interface, "up")
        if socket.has_dualstack_ipv6():
            for number, name in enumerate(names, start=1):
                # nodad: it may be used at once.
                ip("-n", name, "address", "add", f"fd77::{number}/64", "dev", "fast0", "nodad")
        yield names


def start_on(machines: tuple[str, str], ranks: str, start_timeout_s: int, **variables: str) -> list:
    """Rank 0 on the first machine, rank 1 on the second; what each of `ranks` printed."""
    told = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": PORT}
    kept = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
    kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **told, **variables}
    job = [sys.executable, "-c", JOB, str(start_timeout_s)]
    with ExitStack() as stack:
        processes = []
        for rank in ranks:
            process = subprocess.Popen(
                ["ip", "netns", "exec", machines[int(rank)], *job],
                env=kept | {"RANK": rank},
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.kill)
            processes.append(process)
        return [process.communicate(timeout=120)[0] for process in processes]


def test_gloo_takes_the_network_of_the_store(machines):
    first, second = start_on(machines, "01", 60, MASTER_ADDR="10.78.0.1")
    said = f"GLOO_SOCKET_IFNAME=mgmt0: the way to the job's store at 10.78.0.1:{PORT}\n"
    assert first == f"{said}sum 2.0 mgmt0\n"
    assert second == "sum 2.0 mgmt0\n"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
def test_two_machines_meet_over_ipv6(machines):
    """Where gloo finds addresses of both kinds on the interface it is told."""
    first, second = start_on(machines, "01", 60, MASTER_ADDR="[fd77::1]")
    said = f"GLOO_SOCKET_IFNAME=fast0: the way to the job's store at [fd77::1]:{PORT}\n"
    assert first == f"{said}sum 2.0 fast0\n"
    assert second == "sum 2.0 fast0\n"


def test_the_users_choice_stays(machines):
    told = {"MASTER_ADDR": "10.78.0.1", "GLOO_SOCKET_IFNAME": "fast0"}
    assert start_on(machines, "01", 60, **told) == ["sum 2.0 fast0\n"] * 2


def test_no_route_to_the_store(machines):
    (said,) = start_on(machines, "1", 20, MASTER_ADDR="198.51.100.7")
    assert "rank 1 on " in said
    assert f"has no route to the job's store at 198.51.100.7:{PORT}" in said


def test_nobody_answers_from_a_machine_that_is_off(machines):
    (said,) = start_on(machines, "1", 4, MASTER_ADDR="10.77.0.9")
    assert f"has no route to the job's store at 10.77.0.9:{PORT}" in said
    assert "Traceback" not in said


def test_rank_0_is_not_where_master_addr_says(machines):
    (said,) = start_on(machines, "0", 20, MASTER_ADDR="10.77.0.2")
    assert "MASTER_ADDR must be a name or address of rank 0's machine" in said
