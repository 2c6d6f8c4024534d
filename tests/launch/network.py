"""Two machines behind a switch that can lose one of them: namespaces of this machine, which root may make."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.train.launched import kill_all

ROOT = Path(__file__).resolve().parents[2]
FIRST = "10.79.0.1"
"""The first machine's address."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Network:
    """Machines 0 and 1 in a network of their own. A cut is a black hole: no end sees its link go down."""

    def __init__(self) -> None:
        self._names = [f"moesys{os.getpid()}{part}" for part in ("sw", "a", "b")]
        self._switch = self._names[0]
        self.machines = self._names[1:]
        self.started: list[subprocess.Popen[str]] = []

    def cut(self) -> None:
        """The second machine's port leaves the switch."""
        ip("-n", self._switch, "link", "set", "port1", "nomaster")

    def mend(self) -> None:
        ip("-n", self._switch, "link", "set", "port1", "master", "bridge")

    def start(self, machine: int, *words: str, **variables: str) -> subprocess.Popen[str]:
        """A command on a machine, which has its own name there."""
        rename = 'hostname "$0" && exec "$@"'
        enter = ["ip", "netns", "exec", self.machines[machine], "unshare", "--uts"]
        process = subprocess.Popen(
            [*enter, "sh", "-c", rename, f"machine-{'ab'[machine]}", *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        """Leave the machines as they were: the network whole, and nothing runs."""
        self.mend()
        for process in self.started:
            if process.poll() is None:
                kill_all(process)
                process.communicate()
        self.started.clear()

    def start_rank(self, rank: int, *arguments: str) -> subprocess.Popen[str]:
        """One rank of a job of two, on the machine of its number, without torchrun."""
        told = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        meeting = {"MASTER_ADDR": FIRST, "MASTER_PORT": "29571"}
        words = [sys.executable, "-m", "moesys.train", *arguments]
        return self.start(rank, *words, RANK=str(rank), **told, **meeting)


@contextmanager
def made() -> Iterator[Network]:
    """Skips the test where namespaces cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces are made by root, with iproute2 and util-linux")
    network = Network()
    with ExitStack() as stack:
        for name in (network._switch, *network.machines):
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr}")
            stack.callback(ip, "netns", "delete", name)
            ip("-n", name, "link", "set", "lo", "up")
        try:
            ip("-n", network._switch, "link", "add", "bridge", "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no bridges here: {error.stderr}")
        ip("-n", network._switch, "link", "set", "bridge", "up")
        for number, name in enumerate(network.machines):
            port = f"port{number}"
            ends = ["link", "add", "fast0", "netns", name, "type", "veth", "peer", "name", port]
            ip(*ends, "netns", network._switch)
            ip("-n", name, "address", "add", f"10.79.0.{number + 1}/24", "dev", "fast0")
            ip("-n", name, "link", "set", "fast0", "up")
            ip("-n", network._switch, "link", "set", port, "master", "bridge", "up")
        yield network
