"""Ranks in an order in which neighbours are near: those of a node together, nodes of a switch one after another."""

from collections.abc import Sequence

_END = ""


def order_by_topology(addresses: Sequence[str]) -> tuple[int, ...]:
    """The new rank of each rank, from its address `switch.switch.node` (Slurm's SLURM_TOPOLOGY_ADDR).

    Switches, nodes and ranks of a node follow each other as their first ranks were started, so rank 0
    stays rank 0, and an order in which nothing is torn apart stays as it is.
    """
    paths = [(*address.split("."), _END) for address in addresses]
    first: dict[tuple[str, ...], int] = {}
    for rank, path in enumerate(paths):
        for depth in range(1, len(path) + 1):
            first.setdefault(path[:depth], rank)

    def position(rank: int) -> tuple[int, ...]:
        path = paths[rank]
        return (*(first[path[:depth]] for depth in range(1, len(path) + 1)), rank)

    new_ranks = [0] * len(paths)
    for new_rank, rank in enumerate(sorted(range(len(paths)), key=position)):
        new_ranks[rank] = new_rank
    return tuple(new_ranks)
