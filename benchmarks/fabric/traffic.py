"""What crossed each uplink: bytes of frames from the kernel's counters, and exact bytes of TCP payload from the meter."""

import json
import socket
import subprocess
from collections.abc import Collection
from dataclasses import dataclass

from benchmarks.fabric.layout import UPLINK, Layout
from benchmarks.fabric.network import STATE


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One direction of one TCP connection between nodes."""

    node: int
    """Through whose uplink it leaves."""
    source: str
    source_port: int
    destination: str
    destination_port: int
    payload_bytes: int


@dataclass(frozen=True, kw_only=True)
class Uplink:
    """Of one node, since the fabric was made."""

    node: int
    sent_bytes: int
    """Of frames, headers and what was sent again included."""
    received_bytes: int
    sent_packets: int
    dropped_packets: int
    """That its queue had no room for."""
    payload_bytes: int
    """Sent, of TCP: exact, whatever packets it travelled in."""


def flows(layout: Layout) -> list[Flow]:
    """Every connection that crossed an uplink."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(10)
        caller.connect(str(STATE / layout.name / "meter.sock"))
        text = b"".join(iter(lambda: caller.recv(1 << 16), b"")).decode()
    found = []
    for line in text.splitlines():
        node, source, source_port, destination, destination_port, payload = line.split()
        found.append(
            Flow(
                node=int(node),
                source=source,
                source_port=int(source_port),
                destination=destination,
                destination_port=int(destination_port),
                payload_bytes=int(payload),
            )
        )
    return found


def uplinks(layout: Layout, but_ports: Collection[int] = ()) -> list[Uplink]:
    """Of every node; payload without connections to or from `but_ports`, as those of a job's store."""
    payload = [0] * layout.num_nodes
    for flow in flows(layout):
        if not {flow.source_port, flow.destination_port} & set(but_ports):
            payload[flow.node] += flow.payload_bytes
    return [
        Uplink(node=node, payload_bytes=payload[node], **_counters(layout, node))
        for node in range(layout.num_nodes)
    ]


def _counters(layout: Layout, node: int) -> dict[str, int]:
    words = ["ip", "-n", layout.node(node), "-s", "-j", "link", "show", "dev", UPLINK]
    shown = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)[0]["stats64"]
    return {
        "sent_bytes": shown["tx"]["bytes"],
        "received_bytes": shown["rx"]["bytes"],
        "sent_packets": shown["tx"]["packets"],
        "dropped_packets": _dropped(layout.node(node), UPLINK),
    }


def _dropped(space: str, device: str) -> int:
    words = ["tc", "-n", space, "-s", "-j", "qdisc", "show", "dev", device]
    shown = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    return sum(qdisc.get("drops", 0) for qdisc in shown)
