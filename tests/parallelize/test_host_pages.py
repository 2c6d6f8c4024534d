"""Bytes come back as they left, and pages are made for the most that is in use at once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moesys.parallelize.host_pages import HostPages, Lane, Stack

CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 16))
def test_what_is_laid_one_behind_the_other_is_there(sizes: list[int], page_bytes: int) -> None:
    pages = HostPages(CPU, page_bytes)
    stack = Stack(pages)
    laid = [stack.room_for(size) for size in sizes]
    for index, slices in enumerate(laid):
        for part in slices:
            part.fill_(index)
    for index, (size, slices) in enumerate(zip(sizes, laid, strict=True)):
        assert sum(len(part) for part in slices) == size
        assert all((part == index).all() for part in slices)
    assert pages.in_use == -(-sum(sizes) // page_bytes)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100)), max_size=30))
def test_pages_are_used_again(uses: list[tuple[int, int]]) -> None:
    """By stacks of any size, each of which is cleared before it is filled anew."""
    pages = HostPages(CPU, page_bytes=16)
    stacks = [Stack(pages) for _ in range(4)]
    most, of_stack = 0, [0] * 4
    for index, size in uses:
        stacks[index].clear()
        stacks[index].room_for(size)
        of_stack[index] = -(-size // 16)
        most = max(most, sum(of_stack))
        assert pages.in_use == sum(of_stack)
        assert pages.made == most


def test_a_lane_of_a_cpu_has_copied_when_it_says_so() -> None:
    lane = Lane(CPU)
    target = torch.zeros(3)
    with lane.copying():
        target.copy_(torch.ones(3), non_blocking=True)
    lane.wait()
    assert target.tolist() == [1, 1, 1]
