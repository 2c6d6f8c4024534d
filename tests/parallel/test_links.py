"""Links as ranks measure them: the same on all, of the slowest, of the kinds that there are, in a bounded time."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from moesys.parallel import links as links_module
from moesys.parallel.links import SIZES, measured_links
from moesys.plan.links import Link, Links
from moesys.testing.ranks import run_ranks

NEAR, FAR = Link(1e-5, 1e10), Link(1e-4, 1e9)
SLOWEST = 3
"""The rank that needs twice the time."""


class Measured(NamedTuple):
    links: Links
    sizes: list[int]
    """Of all exchanges, in order."""


def _measure(rank: int, size: int, per_node: int) -> list[Links]:
    """By the group of all, and by two groups of half the ranks at once."""
    halves = [dist.new_group([*range(begin, begin + size // 2)]) for begin in (0, size // 2)]
    groups = dist.group.WORLD, halves[rank >= size // 2]
    return [measured_links(group, per_node, torch.device("cpu")) for group in groups]


def test_all_ranks_have_the_same_to_the_bit() -> None:
    told = run_ranks(_measure, 4, 2)
    assert len({str(links) for links, _ in told}) == 1
    assert len({str(links) for _, links in told}) == 1
    both, inside_alone = told[0]
    for link in (both.inside, both.between, inside_alone.inside):
        assert link is not None
        assert link.latency_s >= 0
        assert 1e5 < link.bytes_per_s < 1e13
    assert inside_alone.between is None


def _measure_made_up(rank: int, size: int, per_node: int, times: float) -> Measured:
    """Exchanges take no time but that of `NEAR` and `FAR`."""
    sizes: list[int] = []

    def seconds(probe, num_bytes: int, to: int, from_: int) -> float:
        assert to != rank != from_
        sizes.append(num_bytes)
        crosses = to // per_node != rank // per_node
        link, sharing = (FAR, per_node) if crosses else (NEAR, 1)
        return link.seconds(num_bytes * sharing) * times * (2 if rank == SLOWEST else 1)

    links_module._Probe._seconds = seconds  # type: ignore[method-assign]
    return Measured(measured_links(dist.group.WORLD, per_node, torch.device("cpu")), sizes)


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_the_slowest_rank_counts_and_kinds_that_are_not_there_are_none(per_node: int) -> None:
    for links, sizes in run_ranks(_measure_made_up, 4, per_node, 1.0):
        assert sorted({*sizes}) == [*SIZES]
        for link, made_up, is_there in (
            (links.inside, NEAR, per_node > 1),
            (links.between, FAR, per_node < 4),
        ):
            assert (link is not None) == is_there
            if link is not None:
                assert link.latency_s == pytest.approx(2 * made_up.latency_s)
                assert link.bytes_per_s == pytest.approx(made_up.bytes_per_s / 2)


def test_on_a_slow_network_few_exchanges_are_enough() -> None:
    """4 KiB take 0.02 s there, 256 KiB 0.07 s: 2 MiB might take 0.6 s."""
    for _, sizes in run_ranks(_measure_made_up, 4, 4, 1000.0):
        assert sizes == [SIZES[0]] * (1 + 4) + [SIZES[1]] * 3 + [SIZES[2]]
