"""What one rank tells the rank that judges, as JSON through the job's store."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from moesys.doctor.finding import Finding


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Before the ranks measure together."""

    rank: int
    node: str
    findings: Sequence[Finding]
    """Of its node, from the node's first rank; the others have none."""
    facts: Mapping[str, str]
    """What must, or should, be the same everywhere, by name."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "RankReport":
        read = json.loads(text)
        findings = [Finding(**finding) for finding in read.pop("findings")]
        return RankReport(findings=findings, **read)


@dataclass(frozen=True, kw_only=True)
class LinkTime:
    """Seconds between this rank's node and another, through this rank."""

    node: int
    """The other, by its position among the nodes."""
    exchange_s: float
    """`size_bytes` there and as many back, at once."""
    round_trip_s: float
    """A few bytes there, and then back."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rank measured with the others."""

    rank: int
    node: str
    error: str = ""
    """Why it could not; "" if it could."""
    is_cut_off: bool = False
    """Whether the error came out of a collective, and may be the doing of another rank."""
    size_bytes: int = 0
    rail: int = 0
    """Its position among the ranks of its node: those of one position talk to each other."""
    links: Sequence[LinkTime] = field(default_factory=list)
    product_s: Sequence[float] = field(default_factory=list)
    """One matrix product, in each try; all ranks at the same time."""
    sees_run_dir: bool = True
    """Whether it reads what rank 0 wrote in the folder of the runs."""
    clock_ahead_s: float | None = None
    """Of rank 0's, from the first rank of each other node."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Measured":
        read = json.loads(text)
        links = [LinkTime(**link) for link in read.pop("links")]
        return Measured(links=links, **read)
