"""Groups as integers."""

import pytest

from moesys.parallel.dims import ParallelDims


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (4, 1), (4, 2), (8, 8), (12, 3)])
def test_groups_partition_the_world(world_size, ep):
    dims = ParallelDims(world_size=world_size, ep=ep)
    assert dims.dp == dims.edp * dims.ep == world_size
    for groups, size in ((dims.ep_ranks, dims.ep), (dims.edp_ranks, dims.edp)):
        distinct = {tuple(groups(rank)) for rank in range(world_size)}
        assert all(len(group) == size for group in distinct)
        assert sorted(r for group in distinct for r in group) == list(range(world_size))
        assert all(rank in groups(rank) for rank in range(world_size))


def test_expert_groups_are_neighbours():
    dims = ParallelDims(world_size=8, ep=4)
    assert dims.ep_ranks(6) == [4, 5, 6, 7]
    assert dims.edp_ranks(6) == [2, 6]


def test_a_world_that_does_not_factor_is_refused():
    with pytest.raises(ValueError, match=r"parallel\.ep=3 must divide the world size 8"):
        ParallelDims(world_size=8, ep=3)
