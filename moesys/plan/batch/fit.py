"""What fits on ranks of so many tokens: degrees of rings, packs of short sequences. Pure.

Shapes: S sequences.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from moesys.plan.zigzag import most_ring_tokens


def least_ranks(length: int, capacity_tokens: int) -> int:
    """Of a ring whose ranks have at most `capacity_tokens` each."""
    size = max(1, -(-length // capacity_tokens))
    while most_ring_tokens(length, size) > capacity_tokens:
        size += 1
    return size


def check_fits(lengths: Sequence[int], num_ranks: int, capacity_tokens: int) -> None:
    """Raise ValueError, with its place and both numbers, for a sequence that all ranks together have no memory for."""
    for sequence, length in enumerate(lengths):
        if length > capacity_tokens and least_ranks(length, capacity_tokens) > num_ranks:
            raise ValueError(
                f"sequence {sequence} has {length} tokens, and {num_ranks} ranks of {capacity_tokens} tokens have memory "
                f"for {num_ranks * capacity_tokens}: cut it, skip it, or give ranks more memory"
            )


def best_fit(
    sizes: Sequence[int], order: Sequence[int], capacity: int, rooms: Sequence[int] = ()
) -> list[list[int]]:
    """Packs of at most `rooms`, and then as many more as it takes of at most `capacity`: each of `order` goes where it leaves the
    least room.

    Each of `sizes` is at most `capacity`.
    """
    packs: list[list[int]] = [[] for _ in rooms]
    left = sorted((room, pack) for pack, room in enumerate(rooms))
    for item in order:
        size = sizes[item]
        at = bisect_left(left, (size, -1))
        room, pack = left.pop(at) if at < len(left) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(item)
        insort(left, (room - size, pack))
    return packs
