"""What the emulated cluster is made of: pure, numbers and names.

    rank ns n0r0 --+                             +-- n1r0
                   +-- node ns n0 == core ns == n1 --+
    rank ns n0r1 --+        uplink      uplink   +-- n1r1

Every rank has a namespace with one interface, every node a namespace with a bridge; uplinks join nodes in the core's bridge.
Rates hold in each direction, between a rank and its bridge (`intra`) and between a node and the core (`inter`).
"""

import re
from dataclasses import dataclass

_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
INTERFACE = "eth0"
"""Of every rank, in its namespace."""
BRIDGE, UPLINK = "bridge0", "uplink0"
"""Of every node, in its namespace; the core has a bridge too."""
MAX_NODES, MAX_RANKS = 64, 64


def rate_bits(text: str) -> int:
    """Bits per second of a rate as `tc` writes it: 200mbit, 1.5gbit.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(bit|kbit|mbit|gbit)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise ValueError(
            f"{text!r} is not a rate: write a number with bit, kbit, mbit or gbit, as 200mbit"
        )
    return round(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A kind of cluster, by how much faster a rank talks inside its node than across."""

    ratio: float
    """Bandwidth of one rank inside its node over its share of the uplink."""
    delay_us: int
    """One way, between nodes."""
    meaning: str


PRESETS = {
    "nvlink+ib400": Preset(
        ratio=9,
        delay_us=0,
        meaning="NVLink 450 GB/s inside, one 400 Gbit/s InfiniBand port per GPU",
    ),
    "pcie+25gbe": Preset(
        ratio=64,
        delay_us=0,
        meaning="PCIe 4 x16 25 GB/s inside, one 25 Gbit/s Ethernet port for 8 GPUs",
    ),
    "slow-wan": Preset(
        ratio=1000,
        delay_us=5000,
        meaning="machines of one site each, 10 ms round trip between them",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Of one fabric."""

    name: str = "moesys"
    """Begins the name of each of its namespaces."""
    num_nodes: int
    ranks_per_node: int
    inter_bits: int | None = None
    """Bits per second of each uplink, each way; None = as fast as the machine."""
    intra_bits: int | None = None
    """Of each rank's interface, each way."""
    delay_us: int = 0
    """One way, on each path between nodes: half on each of the two uplinks."""
    mtu: int = 9000
    cores_per_rank: float | None = None
    """What each rank computes with; None = all share the machine's cores as they need them."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not re.fullmatch(r"[a-z][a-z0-9]{0,15}", self.name):
            problems.append(
                f"name={self.name!r}: up to 16 small letters and digits, a letter first"
            )
        for key, value, most in (
            ("nodes", self.num_nodes, MAX_NODES),
            ("ranks-per-node", self.ranks_per_node, MAX_RANKS),
        ):
            if not 1 <= value <= most:
                problems.append(f"{key}={value}: between 1 and {most}")
        if not 576 <= self.mtu <= 65000:
            problems.append(f"mtu={self.mtu}: between 576 and 65000")
        if self.delay_us < 0:
            problems.append(f"delay-us={self.delay_us}: at least 0")
        for key, value in (("inter", self.inter_bits), ("intra", self.intra_bits)):
            if value is not None and value < 8 * self.mtu:
                problems.append(
                    f"{key}={value}bit: at least one packet of {self.mtu} bytes a second"
                )
        if self.cores_per_rank is not None and not 0.1 <= self.cores_per_rank <= 64:
            problems.append(f"cores-per-rank={self.cores_per_rank}: between 0.1 and 64")
        if problems:
            raise ValueError("the fabric cannot be made:\n  " + "\n  ".join(problems))

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def core(self) -> str:
        """The namespace in which all uplinks meet."""
        return f"{self.name}-core"

    def node(self, node: int) -> str:
        """The namespace of a node's bridge."""
        return f"{self.name}-n{node}"

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def rank(self, rank: int) -> str:
        """The namespace of a rank."""
        return f"{self.node(self.node_of(rank))}r{rank % self.ranks_per_node}"

    def port_in_core(self, node: int) -> str:
        """The interface of the core at which a node's uplink ends."""
        return f"n{node}"

    def address(self, rank: int) -> str:
        """10.77.node+1.local rank+1, of one /16."""
        return f"10.77.{self.node_of(rank) + 1}.{rank % self.ranks_per_node + 1}"

    def hosts(self) -> str:
        """The lines of /etc/hosts in every namespace: node0-rank1 is a rank, node0 its first one."""
        lines = ["127.0.0.1 localhost"]
        for rank in range(self.world_size):
            node, local = divmod(rank, self.ranks_per_node)
            names = [f"node{node}-rank{local}", *([f"node{node}"] if local == 0 else [])]
            lines.append(f"{self.address(rank)} {' '.join(names)}")
        return "\n".join(lines) + "\n"

    def namespaces(self) -> list[str]:
        """All of them."""
        nodes = [self.node(node) for node in range(self.num_nodes)]
        return [self.core, *nodes, *(self.rank(rank) for rank in range(self.world_size))]


def with_preset(preset: Preset, intra_bits: int, ranks_per_node: int) -> tuple[int, int]:
    """Bits per second of each uplink, and the delay in us, that give the preset's ratio with ranks of `intra_bits`."""
    return round(intra_bits * ranks_per_node / preset.ratio), preset.delay_us
