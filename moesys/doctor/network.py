"""Interfaces, routes, names and ports: how other machines reach this one."""

import fcntl
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moesys.doctor.finding import Finding, Where, fail, ok, warn
from moesys.parallel.interfaces import chosen_interfaces

MIN_MTU = 1280
FAST_MBIT_PER_S, GOOD_MTU = 10_000, 9000
MIN_PORTS = 10_000
SLOW_NAME_S = 1.0
DEFAULT_PORT = 29500
"""torchrun's."""
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, kw_only=True)
class Interface:
    name: str
    is_up: bool
    mtu: int
    mbit_per_s: int | None
    """None if the driver does not say."""
    addresses: tuple[str, ...]

    @property
    def is_loopback(self) -> bool:
        return all(ipaddress.ip_address(a).is_loopback for a in self.addresses) or self.name == "lo"

    @property
    def is_usable(self) -> bool:
        """Up, and with an address that another machine could know."""
        known = [a for a in self.addresses if not ipaddress.ip_address(a).is_link_local]
        return self.is_up and bool(known) and not self.is_loopback


def judge_interfaces(interfaces: Sequence[Interface], default: Sequence[str]) -> Finding:
    """`default`: the interfaces of the default routes."""
    usable = [interface for interface in interfaces if interface.is_usable]
    if not usable:
        return warn(
            "interfaces",
            "none is up with an address but the loopback",
            "ip link set NAME up, and give it an address: only this machine's own ranks can meet",
        )
    detail = "; ".join(
        f"{i.name} mtu {i.mtu}"
        + (f" {i.mbit_per_s / 1000:g} Gbit/s" if i.mbit_per_s else "")
        + f" {', '.join(i.addresses)}"
        + (" (default route)" if i.name in default else "")
        for i in usable
    )
    small = [i.name for i in usable if i.mtu < MIN_MTU]
    if small:
        return warn(
            "interfaces", detail, f"ip link set {small[0]} mtu 1500: small packets cost much time"
        )
    plain = [i.name for i in usable if (i.mbit_per_s or 0) >= FAST_MBIT_PER_S and i.mtu < GOOD_MTU]
    if plain:
        return warn(
            "interfaces",
            detail,
            f"ip link set {plain[0]} mtu 9000, if all switches between the nodes allow it: a fast link "
            "is kept busy with fewer packets",
        )
    return ok("interfaces", detail)


def judge_choice(variable: str, chosen: str, interfaces: Sequence[Interface]) -> Finding:
    """GLOO_SOCKET_IFNAME (exact names) or NCCL_SOCKET_IFNAME (prefixes; =exact, ^all but)."""
    names = [i.name for i in interfaces if i.is_up]
    if found := chosen_interfaces(variable, chosen, names):
        return ok(variable, f"{chosen}: {', '.join(found)}")
    return fail(
        variable,
        f"{chosen} names no interface that is up; up are {', '.join(names) or 'none'}",
        f"unset {variable}, or set it to one of those",
    )


def judge_route(default: Sequence[str], interfaces: Sequence[Interface]) -> Finding:
    if default:
        return ok("default route", f"through {', '.join(default)}")
    usable = [i.name for i in interfaces if i.is_usable]
    if not usable:
        return ok("default route", "none, nor a network")
    return warn(
        "default route",
        "none: what a process calls this machine's address may be a wrong one",
        f"export GLOO_SOCKET_IFNAME={usable[0]} NCCL_SOCKET_IFNAME={usable[0]}, the network of the nodes",
    )


def judge_infiniband(ports: Sequence[tuple[str, str, str]]) -> Finding:
    """(port, state, rate) of each, as the kernel writes them."""
    if not ports:
        return ok("InfiniBand", "none")
    detail = "; ".join(f"{name} {state} {rate}" for name, state, rate in ports)
    down = [name for name, state, _ in ports if "ACTIVE" not in state]
    if not down:
        return ok("InfiniBand", detail)
    if len(down) == len(ports):
        return fail(
            "InfiniBand",
            detail,
            "no port is active: look at ibstat, the cable and the subnet manager; "
            "NCCL_IB_DISABLE=1 goes over the interfaces meanwhile, slower",
        )
    return warn(
        "InfiniBand",
        detail,
        f"{', '.join(down)} is not active: look at the cable, or leave it out: NCCL_IB_HCA=^{down[0]}",
    )


def judge_name(
    hostname: str, addresses: Sequence[str], seconds: float, chosen: str | None
) -> Finding:
    """What this machine's own name leads to. `chosen`: GLOO_SOCKET_IFNAME, which makes gloo not ask."""
    if not addresses:
        detail = f"{hostname} has no address"
        fix = f"add a line with this machine's address and {hostname} to /etc/hosts"
        if chosen:
            return warn("own name", f"{detail}; gloo goes by GLOO_SOCKET_IFNAME={chosen}", fix)
        return fail("own name", detail, f"{fix}, or set GLOO_SOCKET_IFNAME")
    detail = f"{hostname} is {', '.join(addresses)}"
    if seconds > SLOW_NAME_S:
        return warn(
            "own name",
            f"{detail}, after {seconds:.1f} s",
            f"the name server is slow: add {hostname} to /etc/hosts",
        )
    loopback = [a for a in addresses if ipaddress.ip_address(a.partition("%")[0]).is_loopback]
    if len(loopback) < len(addresses):
        return ok("own name", detail)
    if chosen:
        return ok("own name", f"{detail}, but gloo goes by GLOO_SOCKET_IFNAME={chosen}")
    return warn(
        "own name",
        f"{detail}, where no other machine reaches it",
        f"in /etc/hosts give {hostname} the address of an interface instead of {loopback[0]}, or set "
        "GLOO_SOCKET_IFNAME; training on this machine alone works",
    )


def judge_port(port: int, is_free: bool) -> Finding:
    if is_free:
        return ok("meeting port", f"{port} is free")
    return warn(
        "meeting port",
        f"{port} is in use",
        f"export MASTER_PORT to another one, or end what holds it: ss -ltnp 'sport = :{port}'",
    )


def judge_port_range(first: int, last: int) -> Finding:
    count = last - first + 1
    detail = f"{first} to {last}"
    if count >= MIN_PORTS:
        return ok("outgoing ports", detail)
    return warn(
        "outgoing ports",
        f"{detail}, {count} in all",
        "sysctl net.ipv4.ip_local_port_range='32768 60999': each pair of ranks takes several",
    )


def interfaces_and_routes(where: Where) -> list[Finding]:
    found, default = read_interfaces(), _default_routes()
    choices = [
        judge_choice(variable, os.environ[variable], found)
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        if os.environ.get(variable)
    ]
    return [
        judge_interfaces(found, default),
        judge_route(default, found),
        judge_infiniband(_infiniband_ports()),
        *choices,
    ]


def name(where: Where) -> list[Finding]:
    hostname = socket.gethostname()
    start_s = time.monotonic()
    try:
        infos = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        infos = []
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    seconds = time.monotonic() - start_s
    return [judge_name(hostname, addresses, seconds, os.environ.get("GLOO_SOCKET_IFNAME"))]


def ports(where: Where) -> list[Finding]:
    port = int(os.environ.get("MASTER_PORT", DEFAULT_PORT))
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return [judge_port(port, _is_free(port)), judge_port_range(int(first), int(last))]


def read_interfaces() -> list[Interface]:
    return [_interface(folder) for folder in sorted(Path("/sys/class/net").iterdir())]


def _interface(folder: Path) -> Interface:
    def read(file: str) -> str:
        try:
            return (folder / file).read_text().strip()
        except OSError:  # the speed of an interface that has none
            return ""

    speed = int(read("speed") or -1)
    return Interface(
        name=folder.name,
        # A loopback's and a tunnel's state is "unknown".
        is_up=bool(int(read("flags") or "0", 16) & 1) and read("operstate") in ("up", "unknown"),
        mtu=int(read("mtu") or 0),
        mbit_per_s=speed if speed > 0 else None,
        addresses=(*_ipv4(folder.name), *_ipv6(folder.name)),
    )


def _ipv4(interface: str) -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return []
    return [socket.inet_ntoa(answer[20:24])]


def _ipv6(interface: str) -> list[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    words = [line.split() for line in lines]
    return [str(ipaddress.IPv6Address(int(w[0], 16))) for w in words if w[-1] == interface]


def _default_routes() -> list[str]:
    lines = Path("/proc/net/route").read_text().splitlines()[1:]
    found = [words[0] for line in lines if (words := line.split())[1] == words[7] == "0" * 8]
    try:
        lines = Path("/proc/net/ipv6_route").read_text().splitlines()
    except OSError:
        lines = []
    found += [words[-1] for line in lines if (words := line.split())[:2] == ["0" * 32, "00"]]
    return [route for route in dict.fromkeys(found) if route != "lo"]


def _infiniband_ports() -> list[tuple[str, str, str]]:
    return [
        (
            f"{port.parents[1].name}:{port.name}",
            (port / "state").read_text().strip(),
            (port / "rate").read_text().strip(),
        )
        for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    ]


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True
