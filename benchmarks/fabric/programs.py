"""The two C programs of a fabric: the relay that delays an uplink, the meter that counts what crosses all of them."""

import hashlib
import os
import subprocess
import time
from pathlib import Path

from benchmarks.fabric.layout import UPLINK, Layout

_SOURCES = Path(__file__).resolve().parent
_BUILT = _SOURCES.parents[1] / "build" / "fabric"


def start_relay(layout: Layout, node: int) -> None:
    """Carry packets between both ends of a node's uplink, each half the path's delay later."""
    port = layout.port_in_core(node)
    delay_ns = layout.delay_us * 1000 // 2
    _start(
        layout, "relay", _space(layout.node(node)), UPLINK, _space(layout.core), port, str(delay_ns)
    )


def start_meter(layout: Layout, socket: Path) -> None:
    """Count bytes of TCP payload on every uplink, until the fabric is removed; asked for through `socket`."""
    nodes = [_space(layout.node(node)) for node in range(layout.num_nodes)]
    _start(layout, "meter", str(socket), UPLINK, _space(layout.core), *nodes)
    deadline = time.monotonic() + 5
    while not socket.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the meter did not open {socket} in 5 s")
        time.sleep(0.005)


def _start(layout: Layout, program: str, *arguments: str) -> None:
    """In the core's namespace, where `down` finds it."""
    words = ["ip", "netns", "exec", layout.core, str(_build(program)), *arguments]
    nowhere = subprocess.DEVNULL
    subprocess.Popen(words, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


def _space(name: str) -> str:
    return f"/run/netns/{name}"


def _build(program: str) -> Path:
    """Compile it, once for each state of its source."""
    source = _SOURCES / f"{program}.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    output = _BUILT / f"{program}-{digest}"
    if not output.exists():
        _BUILT.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f"{output.name}.{os.getpid()}.tmp")
        words = [
            "cc",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pthread",
            str(source),
            "-o",
            str(partial),
        ]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}\n{done.stderr}")
        partial.rename(output)
    return output
