"""The same checkpoint in other files: chunks stay as they are, the files that hold them become even.

Any layout loads any checkpoint, so this is not needed for loading. It merges many small files, or cuts large ones.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from moesys.checkpoint import folder as folders
from moesys.checkpoint.errors import CheckpointError, itemize
from moesys.checkpoint.manifest import Chunk, Manifest, read_manifest, write_manifest
from moesys.checkpoint.plan import ITEMSIZE_BYTES, MAX_FILE_BYTES, ChunkWrite, into_files
from moesys.checkpoint.region import Region
from moesys.checkpoint.save import OVERHEAD_BYTES_PER_CHUNK, abandon
from moesys.checkpoint.shards import ShardReader, write_shards
from moesys.checkpoint.verify import verify


@dataclass(frozen=True, kw_only=True)
class ReshardPlan:
    source: Path
    manifest: Manifest
    """Of the source."""
    chunks: Mapping[ChunkWrite, Chunk]
    """What is written, and from where; in the order of the new files."""

    @property
    def file_bytes(self) -> dict[str, int]:
        """New files and the bytes of their chunks."""
        sizes: dict[str, int] = {}
        for write in self.chunks:
            sizes[write.file] = sizes.get(write.file, 0) + self._num_bytes(write)
        return sizes

    @property
    def num_bytes(self) -> int:
        return sum(self.file_bytes.values())

    def _num_bytes(self, write: ChunkWrite) -> int:
        return write.region.numel * ITEMSIZE_BYTES[self.manifest.tensors[write.name].dtype]


def plan_reshard(source: Path, ranks: int, *, max_file_bytes: int = MAX_FILE_BYTES) -> ReshardPlan:
    """Files as `ranks` ranks would write them, each with its even share of the bytes of step folder `source`.

    The largest chunk goes first, each to the rank with the fewest bytes so far. There are fewer files than ranks
    with fewer chunks than ranks, and more where a share exceeds `max_file_bytes`.

    Raises:
        CheckpointError: the source has a bad manifest.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    manifest = read_manifest(source)
    found: dict[tuple[str, Region], tuple[int, Chunk]] = {
        (name, chunk.region): (chunk.region.numel * ITEMSIZE_BYTES[record.dtype], chunk)
        for name, record in manifest.tensors.items()
        for chunk in record.chunks
    }
    shares: list[list[tuple[int, str, Region]]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for (name, region), (num_bytes, _) in sorted(
        found.items(), key=lambda item: (-item[1][0], item[0][0], item[0][1].offsets)
    ):
        load_bytes, rank = loads[0]
        heapq.heapreplace(loads, (load_bytes + num_bytes, rank))
        shares[rank].append((num_bytes, name, region))
    writes = [
        write
        for rank, share in enumerate(shares)
        for write in into_files(rank, share, max_file_bytes)
    ]
    chunks = {write: found[write.name, write.region][1] for write in writes}
    return ReshardPlan(source=source, manifest=manifest, chunks=chunks)


def reshard(
    plan: ReshardPlan,
    directory: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write `directory/step_NNNNNNNN` as planned and read it back; return it. Memory for one chunk.

    `on_progress(bytes_done, bytes_total)` is called after every chunk that is written or read back.

    Raises:
        ValueError: `directory` has that step already.
        CheckpointError: the source is damaged, or the disk full; nothing is left behind.
    """
    step = plan.manifest.step
    if any(folders.step_of(path) == step for path in folders.step_folders(directory)):
        raise ValueError(f"{directory} has step {step} already: name another folder")
    needed_bytes = plan.num_bytes + OVERHEAD_BYTES_PER_CHUNK * len(plan.chunks)
    unfinished: Path | None = None
    try:
        unfinished = folders.start(directory, step, needed_bytes)
        manifest = _copy(plan, unfinished, lambda done: on_progress(done, 2 * plan.num_bytes))
        write_manifest(unfinished, manifest)
        problems = verify(
            unfinished, lambda done, total: on_progress(total + done, 2 * plan.num_bytes)
        )
        if problems:
            raise CheckpointError(itemize("what was written reads back otherwise", problems))
        return folders.commit(unfinished)
    except (CheckpointError, OSError) as error:
        free_bytes = abandon(directory, unfinished)
        raise CheckpointError(
            f"cannot write step {step} in {directory}: {error}\n"
            f"It needs {needed_bytes:,} bytes, {free_bytes:,} are free. {plan.source} is untouched"
        ) from error
    except BaseException:
        abandon(directory, unfinished)
        raise


def _copy(plan: ReshardPlan, folder: Path, on_progress: Callable[[int], None]) -> Manifest:
    """Write the shards; return their manifest. Ranks, state and layout stay those of the save."""
    source = plan.manifest
    with ShardReader(plan.source, source) as reader:
        problems = [p for p in map(reader.size_problem, sorted(source.file_bytes)) if p]
        if problems:
            raise CheckpointError(itemize(f"{plan.source} is damaged", problems))

        def chunk_of(write: ChunkWrite) -> Tensor:
            chunk = reader.chunk(write.name, plan.chunks[write])
            on_progress(reader.bytes_read)
            return chunk

        hashes, file_bytes = write_shards(folder, list(plan.chunks), source.tensors, chunk_of)
    chunks: dict[str, list[Chunk]] = {name: [] for name in source.tensors}
    for write, digest in zip(plan.chunks, hashes, strict=True):
        chunks[write.name].append(
            Chunk(file=write.file, key=write.key, region=write.region, xxh3_128=digest)
        )
    tensors = {
        name: replace(
            record, chunks=tuple(sorted(chunks[name], key=lambda chunk: chunk.region.offsets))
        )
        for name, record in source.tensors.items()
    }
    return replace(source, tensors=tensors, file_bytes=file_bytes)
