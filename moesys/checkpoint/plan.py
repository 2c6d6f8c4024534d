"""Who writes what: every distinct element once, the bytes even over the ranks that hold them. Pure."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesys.checkpoint.errors import CheckpointError, itemize
from moesys.checkpoint.region import Region

MAX_CHUNK_BYTES = 64 << 20
"""A chunk is read and hashed whole, so this bounds what a rank reads beyond its own part."""
MAX_FILE_BYTES = 1 << 30
"""What one damaged or lost file can take with it."""

ITEMSIZE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""The dtypes that a checkpoint may hold."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one rank holds of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    regions: tuple[Region, ...]
    """Boxes of it; several lie one after the other along dim 0 of what the rank has."""

    def within(self, region: Region) -> tuple[slice, ...]:
        """The index that cuts `region`, of one of the boxes, out of what the rank has."""
        first = 0
        for box in self.regions:
            if region.intersect(box) == region:
                index = region.within(box)
                if not first:
                    return index
                return slice(index[0].start + first, index[0].stop + first), *index[1:]
            first += box.shape[0]
        raise ValueError(f"{region} is of none of {self.regions}")


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """A whole tensor and how it is spread at the moment of saving."""

    dtype: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    """Shards along each dim."""


@dataclass(frozen=True, kw_only=True)
class ChunkWrite:
    """One box of one tensor that one rank writes."""

    name: str
    region: Region
    file: str
    key: str


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    tensors: Mapping[str, TensorLayout]
    writes: tuple[tuple[ChunkWrite, ...], ...]
    """Of each rank, in the order of its files."""
    bytes_of_rank: tuple[int, ...]


def plan_save(
    held: Sequence[Mapping[str, Piece]],
    *,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> SavePlan:
    """Assign every box of every tensor to one of the ranks that hold it.

    `held[rank]` maps names to pieces. Boxes above `max_chunk_bytes` are cut. The largest go first, each to
    its holder with the fewest bytes so far: with all tensors replicated no rank exceeds the mean by more
    than one chunk.

    Raises:
        CheckpointError: all tensors whose pieces disagree, overlap in part or leave elements out.
    """
    layouts, holders_of = _merge(held)
    chunks = [
        (part.numel * ITEMSIZE_BYTES[layouts[name].dtype], name, part, holders)
        for (name, region), holders in holders_of.items()
        for part in region.split(max_chunk_bytes // ITEMSIZE_BYTES[layouts[name].dtype])
    ]
    # Forced writes first: replicas then fill up what these leave uneven.
    chunks.sort(key=lambda chunk: (len(chunk[3]) > 1, -chunk[0], chunk[1], chunk[2].offsets))

    load_bytes = [0] * len(held)
    queues: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    mine: list[list[tuple[int, str, Region]]] = [[] for _ in held]
    for num_bytes, name, part, holders in chunks:
        queue = queues.setdefault(holders, [(0, rank) for rank in holders])
        # Loads only grow, so an entry that is out of date goes back with its true load.
        while queue[0][0] < load_bytes[queue[0][1]]:
            heapq.heapreplace(queue, (load_bytes[queue[0][1]], queue[0][1]))
        rank = queue[0][1]
        load_bytes[rank] += num_bytes
        mine[rank].append((num_bytes, name, part))
    return SavePlan(
        tensors=layouts,
        writes=tuple(into_files(rank, parts, max_file_bytes) for rank, parts in enumerate(mine)),
        bytes_of_rank=tuple(load_bytes),
    )


def _merge(
    held: Sequence[Mapping[str, Piece]],
) -> tuple[dict[str, TensorLayout], dict[tuple[str, Region], tuple[int, ...]]]:
    """The layout of each tensor, and which ranks hold each of its boxes."""
    first: dict[str, tuple[int, Piece]] = {}
    holders_of: dict[tuple[str, Region], list[int]] = {}
    problems: list[str] = []
    for rank, pieces in enumerate(held):
        for name, piece in pieces.items():
            owner, known = first.setdefault(name, (rank, piece))
            if (piece.dtype, piece.shape) != (known.dtype, known.shape):
                problems.append(
                    f"{name} is {known.dtype} {list(known.shape)} on rank {owner} "
                    f"but {piece.dtype} {list(piece.shape)} on rank {rank}: make them equal"
                )
            else:
                for region in piece.regions:
                    if region.numel:
                        holders_of.setdefault((name, region), []).append(rank)
    regions_of: dict[str, list[Region]] = {name: [] for name in first}
    for name, region in holders_of:
        regions_of[name].append(region)

    layouts: dict[str, TensorLayout] = {}
    for name, (_, piece) in first.items():
        regions = regions_of[name]
        problem = tiling_problem(piece.shape, regions)
        if problem:
            problems.append(f"{name}: the ranks' shards {problem}")
        offsets = [
            sorted({region.offsets[d] for region in regions}) for d in range(len(piece.shape))
        ]
        layouts[name] = TensorLayout(
            dtype=piece.dtype, shape=piece.shape, grid=tuple(max(1, len(o)) for o in offsets)
        )
    if problems:
        raise CheckpointError(itemize("cannot save", problems))
    return layouts, {key: tuple(ranks) for key, ranks in holders_of.items()}


def tiling_problem(shape: tuple[int, ...], regions: Sequence[Region]) -> str | None:
    """What keeps `regions` from covering a tensor of `shape` exactly once, in words; None if they do."""
    whole = Region.whole(shape)
    for region in regions:
        if len(region.shape) != len(shape) or region.intersect(whole) != region:
            return f"reach outside of {list(shape)}: {list(region.shape)} at {list(region.offsets)}"
    total = sum(region.numel for region in regions)
    if total < whole.numel:
        return f"hold {total} of {whole.numel} elements"
    if total > whole.numel or len({region.offsets for region in regions}) < len(regions):
        return f"overlap: they hold {total} elements, the tensor has {whole.numel}"
    return None


def into_files(
    rank: int, parts: Sequence[tuple[int, str, Region]], max_file_bytes: int
) -> tuple[ChunkWrite, ...]:
    """shard-00003.safetensors, then shard-00003-001.safetensors and so on; a file has at least one chunk."""
    writes: list[ChunkWrite] = []
    index, file_bytes = 0, 0
    for num_bytes, name, region in parts:
        if file_bytes and file_bytes + num_bytes > max_file_bytes:
            index, file_bytes = index + 1, 0
        file_bytes += num_bytes
        suffix = f"-{index:03d}" if index else ""
        writes.append(
            ChunkWrite(
                name=name,
                region=region,
                file=f"shard-{rank:05d}{suffix}.safetensors",
                # What follows the last @ has no @, so no two names share a key.
                key=f"{name}@{','.join(map(str, region.offsets))}",
            )
        )
    return tuple(writes)
