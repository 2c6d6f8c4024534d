"""Groups as integers: equations, partitions, and the same groups as the meshes."""

import itertools
import math

import pytest
import torch.distributed as dist

from moesys.config.schema import ParallelConfig
from moesys.parallel.dims import ParallelDims, nodes_and_rails, parallel_dims
from moesys.parallel.mesh import build_meshes
from moesys.testing.ranks import run_ranks

SIZES = (1, 2, 4, 6, 8, 12, 16, 24)


def all_dims() -> list[ParallelDims]:
    found = []
    degrees = (1, 2, 3, 4)
    for world_size, pp, dp_shard, cp, tp, ep, etp in itertools.product(
        SIZES, (1, 2), (1, 2, 4), (1, 2), degrees, degrees, (1, 2)
    ):
        try:
            dims = ParallelDims(
                world_size=world_size, pp=pp, dp_shard=dp_shard, cp=cp, tp=tp, ep=ep, etp=etp
            )
        except ValueError:
            continue
        found.append(dims)
    return found


ALL = all_dims()


def test_both_grids_are_the_whole_world():
    assert len(ALL) > 300
    for dims in ALL:
        for grid in (dims.dense_axes, dims.expert_axes):
            assert math.prod(grid.values()) == dims.world_size, dims
        assert dims.dp * dims.cp * dims.tp == dims.edp * dims.ep * dims.etp == dims.stage_size
        assert dims.dp == dims.dp_replicate * dims.dp_shard


def test_groups_of_any_axes_partition_the_world():
    for dims in ALL:
        for grid in (dims.dense_axes, dims.expert_axes):
            for axes in itertools.chain(
                ((axis,) for axis in grid), itertools.combinations(grid, 2), [tuple(grid)]
            ):
                groups = dims.groups(*axes)
                size = math.prod(grid[axis] for axis in axes)
                assert all(len(group) == size and group == sorted(group) for group in groups)
                assert sorted(itertools.chain(*groups)) == list(range(dims.world_size))


def test_coordinates_say_where_in_its_groups_a_rank_is():
    for dims in ALL:
        for rank in range(dims.world_size):
            for axis, index in dims.coordinates(rank).items():
                assert dims.group_of(rank, axis)[index] == rank


def test_experts_of_one_dense_copy_stay_in_it_or_span_whole_copies():
    """Sharded experts never pair ranks of different copies."""
    for dims in ALL:
        if dims.edp_shard > 1:
            copies = [set(group) for group in dims.groups("dp_shard", "cp", "tp")]
            for group in dims.groups("edp_shard", "ep", "etp"):
                assert any(set(group) <= copy for copy in copies), dims


def test_neighbours_talk_most():
    dims = ParallelDims(world_size=16, pp=2, dp_shard=2, tp=2, ep=4)
    assert dims.groups("tp")[:3] == [[0, 1], [2, 3], [4, 5]]
    assert dims.groups("ep")[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dims.groups("dp_shard", "cp")[0] == [0, 2]
    assert dims.groups("pp")[3] == [3, 11]


@pytest.mark.parametrize(
    ("degrees", "rule"),
    [
        ({"ep": 3}, "ep=3 .* must divide the 8 ranks of a pipeline stage"),
        ({"tp": 3}, "tp=3 .* must divide world_size=8"),
        ({"pp": 2, "tp": 8}, "pp=2 .* tp=8 = 16 must divide world_size=8"),
        ({"dp_shard": 3}, "dp_shard=3 must divide dp=8"),
        ({"etp": 0}, "etp=0 must be at least 1"),
    ],
)
def test_a_world_that_does_not_factor_is_refused(degrees, rule):
    with pytest.raises(ValueError, match=rule):
        ParallelDims(world_size=8, **degrees)


def test_experts_that_straddle_dense_copies_are_refused():
    with pytest.raises(ValueError, match=r"ep=4 \* etp=1 = 4 must divide dp_shard\*cp\*tp=6"):
        ParallelDims(world_size=12, dp_shard=3, tp=2, ep=4)


def test_experts_may_straddle_copies_that_are_whole():
    """Nothing is sharded within a copy then: three ranks' experts fold over pairs of tp ranks."""
    dims = ParallelDims(world_size=6, tp=2, ep=3)
    assert dims.groups("ep") == [[0, 1, 2], [3, 4, 5]]
    assert parallel_dims(ParallelConfig(tp=2, ep=3, zero=3), 6).edp_shard == 2


def test_zero_shards_over_all_data_ranks_unless_told():
    assert parallel_dims(ParallelConfig(tp=2), 8).dp_shard == 1
    assert parallel_dims(ParallelConfig(tp=2, zero=3), 8).dp_shard == 4
    assert parallel_dims(ParallelConfig(tp=2, zero=1, dp_shard=2), 8).dp_replicate == 2


def _mesh_groups(rank: int, size: int, dims: ParallelDims) -> None:
    meshes = build_meshes(dims, "cpu")
    for axis in ("pp", "dp_replicate", "tp"):
        assert _ranks(meshes.dense.get_group(axis)) == dims.group_of(rank, axis)
    for axis in dims.expert_axes:
        assert _ranks(meshes.expert.get_group(axis)) == dims.group_of(rank, axis)
    assert _ranks(meshes.dense.get_group("shard")) == dims.group_of(rank, "dp_shard", "cp")
    assert _ranks(meshes.cp_group) == dims.group_of(rank, "cp")
    assert _ranks(meshes.sequence_group) == dims.group_of(rank, "cp", "tp")
    data = ("dp_replicate", "dp_shard", "cp")
    assert _ranks(meshes.replica_group) == dims.group_of(rank, *data)
    assert _ranks(meshes.stage_group) == dims.group_of(rank, *data, "tp")
    assert _ranks(meshes.edp_group) == dims.group_of(rank, "edp_replicate", "edp_shard")
    # Ranks with the same tokens, and no others, have the same dp rank.
    same = [None] * size
    dist.all_gather_object(same, meshes.dp_rank)
    assert [r for r in range(size) if same[r] == meshes.dp_rank] == sorted(
        r for first in dims.group_of(rank, "cp", "tp") for r in dims.group_of(first, "pp")
    )


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


@pytest.mark.parametrize(
    "dims",
    [
        ParallelDims(world_size=8, pp=2, dp_shard=2, tp=2, ep=4),
        ParallelDims(world_size=8, cp=2, tp=2, ep=2, etp=2),
        ParallelDims(world_size=8, dp_shard=2, ep=2),
    ],
)
def test_meshes_have_these_groups(dims):
    run_ranks(_mesh_groups, 8, dims)


def test_nodes_and_rails() -> None:
    assert nodes_and_rails([0, 1, 2, 3, 4, 5], 2) == (
        [[0, 1], [2, 3], [4, 5]],
        [[0, 2, 4], [1, 3, 5]],
    )
    assert nodes_and_rails([1, 3, 5, 7], 4) == ([[1, 3], [5, 7]], [[1, 5], [3, 7]])
    assert nodes_and_rails([2, 6, 10], 4) == ([[2], [6], [10]], [[2, 6, 10]])
    for ranks in ([0, 1, 2], [0, 2, 1, 3], [0, 4, 1, 5]):
        with pytest.raises(ValueError, match="do not lie in equal numbers"):
            nodes_and_rails(ranks, 2)
