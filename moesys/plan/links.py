"""How long bytes take through a link, from times that were measured. Pure."""

import math
import operator
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self


class Timed(NamedTuple):
    """Exchanges of one size."""

    num_bytes: float
    """Through the link, one way."""
    seconds: Sequence[float]
    """Of each."""


class Link(NamedTuple):
    """Of which a transfer takes `latency_s` and the time of its bytes."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


class Links(NamedTuple):
    """That copies of experts take."""

    inside: Link | None
    """Of a rank to others on its node, each way; None where it has no neighbours."""
    between: Link | None
    """A node's uplink, that all its ranks share, each way; None where all are on one node."""

    def fields(self) -> dict[str, float]:
        """As records have them."""
        return {
            name: figure
            for kind, link in zip(self._fields, self, strict=True)
            if link is not None
            for name, figure in (
                (f"{kind}_gbit_per_s", link.bytes_per_s * 8 / 1e9),
                (f"{kind}_latency_us", link.latency_s * 1e6),
            )
        }

    def told(self) -> list[list[float] | None]:
        """In lists, as files have it."""
        return [None if link is None else [*link] for link in self]

    @classmethod
    def of(cls, told: Sequence[Sequence[float] | None]) -> Self:
        """The same, to the bit."""
        return cls(*(None if link is None else Link(*link) for link in told))


def fitted_link(timed: Sequence[Timed]) -> Link:
    """The line through the medians of each size, of which there are two or more, from the smallest on: least squares of errors
    relative to the times, so that the largest exchange does not hide the latency. That is never below 0. Where times do not
    grow with bytes the rate is that of the largest exchange, at least, and the latency the shortest time.

    The same on all ranks that have the same times: no step of it depends on the processor.
    """
    points = [(size, statistics.median(seconds)) for size, seconds in timed]
    weights = [1 / time**2 for _, time in points]

    def mean(values: Iterable[float]) -> float:
        return math.fsum(map(operator.mul, weights, values)) / math.fsum(weights)

    size_mean, time_mean = mean(size for size, _ in points), mean(time for _, time in points)
    covariance = mean((size - size_mean) * (time - time_mean) for size, time in points)
    seconds_per_byte = covariance / mean((size - size_mean) ** 2 for size, _ in points)
    if seconds_per_byte <= 0:
        size, time = points[-1]
        return Link(latency_s=min(time for _, time in points), bytes_per_s=size / time)
    latency_s = time_mean - seconds_per_byte * size_mean
    if latency_s < 0:
        through_0 = mean(size * time for size, time in points) / mean(size**2 for size, _ in points)
        return Link(latency_s=0.0, bytes_per_s=1 / through_0)
    return Link(latency_s=latency_s, bytes_per_s=1 / seconds_per_byte)
