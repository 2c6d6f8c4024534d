"""The save plan: every element written once, by a rank that has it, in even shares."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesys.checkpoint.errors import CheckpointError
from moesys.checkpoint.plan import ITEMSIZE_BYTES, ChunkWrite, Piece, SavePlan, plan_save
from moesys.checkpoint.region import Region


def grid_pieces(dtype: str, shape: tuple[int, ...], grid: tuple[int, ...]) -> list[Piece]:
    """The boxes of a tensor cut as torch.chunk cuts each dim; trailing ones may be empty."""
    cuts = []
    for size, parts in zip(shape, grid, strict=True):
        step = math.ceil(size / parts)
        starts = [min(i * step, size) for i in range(parts)]
        cuts.append([(a, min(step, size - a)) for a in starts])
    return [
        Piece(
            dtype=dtype,
            shape=shape,
            regions=(Region(offsets=tuple(a for a, _ in box), shape=tuple(n for _, n in box)),),
        )
        for box in itertools.product(*cuts)
    ]


@st.composite
def worlds(draw: st.DrawFn) -> list[dict[str, Piece]]:
    """2..8 ranks with tensors in random grids, each box held by one or more ranks."""
    num_ranks = draw(st.sampled_from([1, 2, 4, 6, 8]))
    held: list[dict[str, Piece]] = [{} for _ in range(num_ranks)]
    for index in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        dtype = draw(st.sampled_from(sorted(ITEMSIZE_BYTES)))
        num_shards = draw(st.sampled_from([n for n in (1, 2, 4) if num_ranks % n == 0]))
        dim = draw(st.integers(0, len(shape) - 1)) if shape else None
        grid = tuple(num_shards if d == dim else 1 for d in range(len(shape)))
        pieces = grid_pieces(dtype, shape, grid)
        for rank in range(num_ranks):
            held[rank][f"t{index}"] = pieces[rank % len(pieces)]
    owners = draw(st.lists(st.integers(0, num_ranks - 1), max_size=9))
    for rank in range(num_ranks):
        held[rank]["experts"] = rows_piece(
            [i for i, owner in enumerate(owners) if owner == rank], len(owners)
        )
    return held


def rows_piece(rows: list[int], of: int) -> Piece:
    """Some rows of [of, 2], each a box of its own."""
    regions = (Region(offsets=(row, 0), shape=(1, 2)) for row in rows)
    return Piece(dtype="float32", shape=(of, 2), regions=tuple(regions))


def counts(plan: SavePlan) -> dict[str, torch.Tensor]:
    written = {name: torch.zeros(layout.shape) for name, layout in plan.tensors.items()}
    for write in itertools.chain(*plan.writes):
        whole = Region.whole(plan.tensors[write.name].shape)
        written[write.name][write.region.within(whole)] += 1
    return written


@given(worlds(), st.integers(1, 300), st.integers(1, 1000))
def test_every_element_is_written_once_by_a_holder(
    held: list[dict[str, Piece]], max_chunk_bytes: int, max_file_bytes: int
) -> None:
    plan = plan_save(held, max_chunk_bytes=max_chunk_bytes, max_file_bytes=max_file_bytes)
    assert set(plan.tensors) == {name for pieces in held for name in pieces}
    for written in counts(plan).values():
        assert torch.equal(written, torch.ones_like(written))

    keys = Counter((write.file, write.key) for write in itertools.chain(*plan.writes))
    assert all(times == 1 for times in keys.values())
    file_bytes: Counter[str] = Counter()
    num_chunks: Counter[str] = Counter()
    for rank, writes in enumerate(plan.writes):
        num_bytes = 0
        for write in writes:
            piece = held[rank][write.name]
            whole = Region.whole(piece.shape)
            places = torch.arange(math.prod(piece.shape)).view(piece.shape)
            assert torch.equal(cut_from_storage(piece, write), places[write.region.within(whole)])
            assert write.file.startswith(f"shard-{rank:05d}")
            itemsize = ITEMSIZE_BYTES[piece.dtype]
            assert write.region.numel * itemsize <= max(max_chunk_bytes, itemsize)
            num_bytes += write.region.numel * itemsize
            file_bytes[write.file] += write.region.numel * itemsize
            num_chunks[write.file] += 1
        assert num_bytes == plan.bytes_of_rank[rank]
    assert all(file_bytes[f] <= max_file_bytes or num_chunks[f] == 1 for f in file_bytes)


def cut_from_storage(piece: Piece, write: ChunkWrite) -> torch.Tensor:
    """What `write` finds in a rank's storage, where each number is its place in the whole."""
    places, whole = (
        torch.arange(math.prod(piece.shape)).view(piece.shape),
        Region.whole(piece.shape),
    )
    boxes = [places[region.within(whole)] for region in piece.regions]
    storage = torch.cat(boxes) if piece.shape else boxes[0]
    return storage[piece.within(write.region)]


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=30), st.integers(1, 16))
def test_replicated_tensors_are_spread_evenly(sizes: list[int], num_ranks: int) -> None:
    tensors = {
        f"t{i}": Piece(dtype="uint8", shape=(n,), regions=(Region.whole((n,)),))
        for i, n in enumerate(sizes)
    }
    plan = plan_save([tensors] * num_ranks, max_chunk_bytes=256)
    largest = min(max(sizes), 256)
    assert max(plan.bytes_of_rank) <= sum(sizes) / num_ranks + largest


def test_replicas_fill_up_what_shards_leave_uneven() -> None:
    experts = grid_pieces("uint8", (300, 1), (3, 1))
    dense = Piece(dtype="uint8", shape=(100,), regions=(Region.whole((100,)),))
    held = [{"dense": dense, "experts": experts[rank]} for rank in range(3)] + [{"dense": dense}]
    assert plan_save(held).bytes_of_rank == (100, 100, 100, 100)


def test_the_plan_does_not_depend_on_the_order_of_names() -> None:
    pieces = {f"t{i}": grid_pieces("float32", (8, i + 1), (1, 1))[0] for i in range(5)}
    backwards = dict(reversed(pieces.items()))
    assert plan_save([pieces, pieces]).writes == plan_save([backwards, pieces]).writes


def test_bad_shards_are_refused_all_at_once() -> None:
    def piece(offset: int, rows: int, dtype: str = "int8") -> Piece:
        return Piece(dtype=dtype, shape=(8,), regions=(Region(offsets=(offset,), shape=(rows,)),))

    held = [
        {"hole": piece(0, 4), "overlap": piece(0, 5), "type": piece(0, 8), "out": piece(4, 8)},
        {"hole": piece(4, 3), "overlap": piece(3, 5), "type": piece(0, 8, "bool")},
    ]
    with pytest.raises(CheckpointError) as error:
        plan_save(held)
    message = str(error.value)
    assert "hole: the ranks' shards hold 7 of 8 elements" in message
    assert "overlap: the ranks' shards overlap" in message
    assert "type is int8 [8] on rank 0 but bool [8] on rank 1" in message
    assert "out: the ranks' shards reach outside of [8]" in message
