"""Makes a fabric of namespaces, bridges and shaped links, and removes it: needs root, `ip` and `tc`."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.fabric import cores
from benchmarks.fabric.layout import BRIDGE, INTERFACE, UPLINK, Layout
from benchmarks.fabric.programs import start_meter, start_relay

STATE = Path("/run/moesys-fabric")
"""A folder per fabric: layout.json, and the socket of its meter."""
_HOSTS = Path("/etc/netns")
"""Where `ip netns exec` finds the files that stand in the place of those in /etc."""
QUEUE_MS = 100
"""A packet that would wait longer at an uplink is lost, as in a switch."""


class FabricError(RuntimeError):
    """The fabric cannot be made, or is not there."""


def why_not() -> str | None:
    """Why no fabric can be made here, with the fix; None if one can."""
    missing = [tool for tool in ("ip", "tc", "unshare", "cc") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install iproute2 util-linux gcc"
    if os.geteuid() != 0:
        return "a fabric is made of network namespaces, which needs root: sudo moesys-fabric ..."
    probe = f"moesysprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"this machine makes no network namespaces ({made.stderr.strip()}): run on a host or a privileged container"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


def up(layout: Layout) -> None:
    """Make the fabric; one of the same name is removed first. What fails leaves nothing behind.

    Raises:
        FabricError: it cannot be made; why, and the fix.
    """
    reason = why_not()
    if reason is None and layout.cores_per_rank is not None:
        reason = cores.why_not()
    if reason is not None:
        raise FabricError(reason)
    down(layout.name)
    try:
        _make(layout)
    except BaseException:
        down(layout.name)
        raise


def down(name: str) -> int:
    """Remove the fabric and end every process in it; return how many namespaces there were. May be called at any time."""
    spaces = _namespaces(name)
    for space in spaces:
        _end_processes(space)
        subprocess.run(["ip", "netns", "delete", space], capture_output=True)
        shutil.rmtree(_HOSTS / space, ignore_errors=True)
    cores.remove_groups(name)
    shutil.rmtree(STATE / name, ignore_errors=True)
    return len(spaces)


@contextlib.contextmanager
def fabric(layout: Layout) -> Iterator[Layout]:
    """A fabric for as long as the context lasts, or this process does: a guard removes it even after kill -9.

    Raises:
        FabricError: as `up`.
    """
    words = [sys.executable, "-m", "benchmarks.fabric", "guard", "--name", layout.name]
    root = Path(__file__).resolve().parents[2]
    up(layout)
    guard = subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, start_new_session=True)
    assert guard.stdin is not None
    try:
        yield layout
    finally:
        guard.stdin.close()
        guard.wait()


def layout_of(name: str) -> Layout:
    """Of the fabric that is up.

    Raises:
        FabricError: there is none.
    """
    file = STATE / name / "layout.json"
    if not file.is_file() or not _namespaces(name):
        raise FabricError(
            f"no fabric {name!r} is up: moesys-fabric up --nodes 4 --ranks-per-node 2"
        )
    return Layout(**json.loads(file.read_text()))


def _make(layout: Layout) -> None:
    spaces = layout.namespaces()
    _batch([f"netns add {space}" for space in spaces])
    for space in spaces:
        # A machine without IPv6 sends nothing that nobody asked for.
        _run("ip", "netns", "exec", space, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
        folder = _HOSTS / space
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(layout.hosts())
    _bridge(layout.core, layout)
    for node in range(layout.num_nodes):
        _bridge(layout.node(node), layout)
        _uplink(layout, node)
    for rank in range(layout.world_size):
        _rank(layout, rank)
    cores.make_groups(layout)
    folder = STATE / layout.name
    folder.mkdir(parents=True, exist_ok=True)
    start_meter(layout, folder / "meter.sock")
    partial = folder / "layout.json.tmp"
    partial.write_text(json.dumps(dataclasses.asdict(layout)))
    partial.rename(folder / "layout.json")


def _bridge(space: str, layout: Layout) -> None:
    _batch(
        [
            "link set dev lo up",
            f"link add name {BRIDGE} mtu {layout.mtu} type bridge",
            f"link set dev {BRIDGE} up",
        ],
        space,
    )


def _uplink(layout: Layout, node: int) -> None:
    """Between a node's bridge and the core's: a cable, or where there is delay a relay between two taps."""
    space, port = layout.node(node), layout.port_in_core(node)
    if layout.delay_us:
        for where, device in ((space, UPLINK), (layout.core, port)):
            _batch([f"tuntap add dev {device} mode tap"], where)
        start_relay(layout, node)
    else:
        _batch(
            [f"link add name {UPLINK} netns {space} type veth peer name {port} netns {layout.core}"]
        )
    for where, device in ((space, UPLINK), (layout.core, port)):
        _batch([f"link set dev {device} mtu {layout.mtu} master {BRIDGE} up"], where)
        _shape(where, device, layout.inter_bits, layout.mtu)


def _rank(layout: Layout, rank: int) -> None:
    space, node = layout.rank(rank), layout.node(layout.node_of(rank))
    port = f"r{rank % layout.ranks_per_node}"
    _batch([f"link add name {INTERFACE} netns {space} type veth peer name {port} netns {node}"])
    _batch([f"link set dev {port} mtu {layout.mtu} master {BRIDGE} up"], node)
    _batch(
        [
            "link set dev lo up",
            f"link set dev {INTERFACE} mtu {layout.mtu} up",
            f"addr add {layout.address(rank)}/16 dev {INTERFACE}",
        ],
        space,
    )
    _shape(space, INTERFACE, layout.intra_bits, layout.mtu)
    _shape(node, port, layout.intra_bits, layout.mtu)


def _shape(space: str, device: str, rate_bits: int | None, mtu: int) -> None:
    """Send at most at this rate. The bucket holds 2 ms, so that even a short message is not faster."""
    if rate_bits is None:
        return
    burst_bytes = max(4 * (mtu + 14), rate_bits // 8 // 500)
    limit_bytes = burst_bytes + rate_bits // 8 * QUEUE_MS // 1000
    shape = ["rate", f"{rate_bits}bit", "burst", str(burst_bytes), "limit", str(limit_bytes)]
    _run("tc", "-n", space, "qdisc", "add", "dev", device, "root", "tbf", *shape)


def _namespaces(name: str) -> list[str]:
    listed = _run("ip", "netns", "list").splitlines()
    return [line.split()[0] for line in listed if line.startswith(f"{name}-")]


def _end_processes(space: str, patience_s: float = 5.0) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
        pids = [int(pid) for pid in found.stdout.split()]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _batch(lines: list[str], space: str | None = None) -> None:
    """Lines of `ip`, in one process."""
    words = ["ip", *(["-n", space] if space else []), "-batch", "-"]
    done = subprocess.run(words, input="\n".join(lines), capture_output=True, text=True)
    if done.returncode:
        raise FabricError(f"{' '.join(words)} <<< {lines}: {done.stderr.strip()}")


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise FabricError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
