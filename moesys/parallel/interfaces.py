"""The network interface that leads to the job's store: the one that gloo and NCCL shall use between machines."""

import ipaddress
import socket
from collections.abc import Collection, Mapping, Sequence

import psutil

VIRTUAL = ("docker", "br-", "virbr", "veth", "cni", "flannel", "cali", "tun", "tap")
"""Interfaces of containers and virtual machines begin so: they lead to no other machine."""


def choose_interface(
    interfaces: Mapping[str, Sequence[str]], running: Collection[str], own_address: str
) -> str | None:
    """The name of the interface that holds `own_address`, the address on the way to the store.

    A loopback address leads to no other machine (/etc/hosts may give a machine's own name one): then the
    only other interface that is `running` and not a container's. None if there is no one choice.
    """
    if not is_loopback(own_address):
        named = [name for name, addresses in interfaces.items() if own_address in addresses]
        return named[0] if named else None
    outward = [
        name
        for name, addresses in interfaces.items()
        if name in running
        and not name.startswith(VIRTUAL)
        and any(leads_outward(address) for address in addresses)
    ]
    return outward[0] if len(outward) == 1 else None


def chosen_interfaces(variable: str, chosen: str, names: Sequence[str]) -> list[str]:
    """Those of `names` that a variable chooses: GLOO_SOCKET_IFNAME by exact names, [] if one is absent; NCCL_SOCKET_IFNAME
    by prefixes, `=` before exact names, `^` before those left out. An empty one chooses all."""
    if not chosen:
        return list(names)
    wanted = chosen.lstrip("^=").split(",")
    if variable.startswith("GLOO"):
        return wanted if set(wanted) <= set(names) else []
    is_exact = chosen.lstrip("^").startswith("=")
    found = [n for n in names if (n in wanted if is_exact else n.startswith(tuple(wanted)))]
    return [n for n in names if n not in found] if chosen.startswith("^") else found


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def leads_outward(address: str) -> bool:
    """Whether another machine may reach it without being told an interface."""
    parsed = ipaddress.ip_address(address)
    return not parsed.is_loopback and not parsed.is_link_local


def interfaces_here() -> dict[str, list[str]]:
    """The addresses of each interface of this machine."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [a.address.partition("%")[0] for a in addresses if a.family in families]
        for name, addresses in psutil.net_if_addrs().items()
    }


def running_here() -> set[str]:
    """The interfaces with something at their other end. The kernel may say so a second late."""
    return {name for name, state in psutil.net_if_stats().items() if state.isup}


def own_address(host: str) -> str | None:
    """This machine's address on the way to `host`; None without a way. Sends nothing."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
            except OSError:
                continue
            return str(probe.getsockname()[0]).partition("%")[0]
    return None
