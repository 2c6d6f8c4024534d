"""A save in two parts: what the ranks agree on (`prepare`), and its way to the disk (`write`)."""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moesys.checkpoint import folder as folders
from moesys.checkpoint.errors import CheckpointError, Superseded, itemize
from moesys.checkpoint.manifest import (
    RANK_PREFIX,
    Chunk,
    Manifest,
    TensorRecord,
    json_problems,
    write_manifest,
)
from moesys.checkpoint.plan import ChunkWrite, Piece, SavePlan, plan_save
from moesys.checkpoint.ranks import Ranks
from moesys.checkpoint.shards import local_piece, local_tensor, write_shards

OVERHEAD_BYTES_PER_CHUNK = 1024
"""More than a chunk takes beside its data: its entries in a shard's header and in the manifest."""


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    step: int
    path: Path
    bytes: int
    """On disk, all ranks together."""
    seconds: float
    """From its begin to its end."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A save that all ranks agreed on."""

    step: int
    state: dict[str, Any]
    keep_last: int
    tensors: Mapping[str, Tensor]
    """All that this rank holds, its own tensors under RANK_PREFIX."""
    pieces: Mapping[str, Piece]
    plan: SavePlan

    @property
    def needed_bytes(self) -> int:
        """On disk, a little too many."""
        num_chunks = sum(len(writes) for writes in self.plan.writes)
        return sum(self.plan.bytes_of_rank) + OVERHEAD_BYTES_PER_CHUNK * num_chunks

    def part(self, write: ChunkWrite) -> Tensor:
        """What `write` writes: a view of this rank's tensor, wherever that is."""
        whole = local_tensor(self.tensors[write.name])
        return whole[self.pieces[write.name].within(write.region)]

    def chunk(self, write: ChunkWrite) -> Tensor:
        """As `part`, contiguous on the CPU."""
        return self.part(write).cpu().contiguous()


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    *,
    rank_tensors: Mapping[str, Tensor] | None = None,
    keep_last: int,
    group: dist.ProcessGroup | None = None,
) -> SaveResult:
    """Write `directory/step_NNNNNNNN`, then remove all but the newest `keep_last` steps. Collective.

    Args:
        tensors: by name. Ranks may hold different names (pipeline stages). A plain tensor must be equal on
            all ranks that hold it: one of them writes it.
        state: JSON; rank 0's is kept. Tuples come back as lists.
        rank_tensors: this rank's alone (RNG states); `load` returns them if as many ranks load.

    The folder takes its name once all of it is on the disk: a crash before that leaves the earlier ones as
    they were. All ranks must see the same file system.

    Raises:
        CheckpointError: the same on all ranks if any of them could not write; earlier checkpoints are
            untouched and nothing of this one is left.
    """
    start_s = time.perf_counter()
    ranks = Ranks(group)
    prepared = prepare(step, tensors, state, rank_tensors or {}, keep_last, ranks)
    result = write(prepared, prepared.chunk, directory, ranks)
    return replace(result, seconds=time.perf_counter() - start_s)


def prepare(
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    rank_tensors: Mapping[str, Tensor],
    keep_last: int,
    ranks: Ranks,
    former: Prepared | None = None,
) -> Prepared:
    """Agree on who writes what. Collective. A `former` save of the same pieces lends its plan.

    Raises:
        CheckpointError: the same on all ranks, if any has what cannot be saved.
    """
    mine = dict(tensors)
    mine |= {f"{RANK_PREFIX}{ranks.rank}/{name}": t for name, t in rank_tensors.items()}
    pieces = ranks.each(lambda: _describe(tensors, mine, state, keep_last))
    is_same = former is not None and former.pieces == pieces
    if former is not None and all(ranks.gather(is_same)):
        plan = former.plan
    else:
        plan = plan_save(ranks.gather(pieces))
    return Prepared(
        step=step, state=state, keep_last=keep_last, tensors=mine, pieces=pieces, plan=plan
    )


def write(
    prepared: Prepared,
    chunk_of: Callable[[ChunkWrite], Tensor],
    directory: Path,
    ranks: Ranks,
    before_commit: Callable[[], None] = lambda: None,
    check_turn: Callable[[], None] | None = None,
) -> SaveResult:
    """Put a prepared save on the disk. Collective; any thread may do it if `ranks` are its own. Raises as `save`.

    `chunk_of` gives the chunks of this rank's writes, contiguous on the CPU; rank 0 calls `before_commit` before
    the folder takes its name.

    `check_turn` raises Superseded if another job has taken the folder over; rank 0 asks before each change. A job
    that asks has cleared the folder at its start: what is unfinished now is none of its own.
    """
    start_s = time.perf_counter()
    step, plan = prepared.step, prepared.plan
    unfinished: Path | None = None

    def commit() -> Path:
        assert unfinished is not None
        before_commit()
        if check_turn is not None:
            check_turn()
        return folders.commit(unfinished)

    try:
        unfinished = ranks.first(lambda: _start(directory, prepared, check_turn))
        written = ranks.each(lambda: _write_mine(unfinished, prepared, chunk_of, ranks.rank))
        manifest = _manifest(step, prepared.state, plan, ranks.gather(written))
        manifest_bytes = ranks.first(lambda: write_manifest(unfinished, manifest))
        path = ranks.first(commit)
    except Superseded:
        ranks.first(lambda: abandon(directory, unfinished))
        raise
    except CheckpointError as error:
        free_bytes = ranks.first(lambda: abandon(directory, unfinished))
        ranks.first(lambda: _ask_again(check_turn))  # it may be why
        raise CheckpointError(
            f"cannot save step {step} in {directory}: {error}\n"
            f"It needs {prepared.needed_bytes:,} bytes, {free_bytes:,} are free. Earlier checkpoints are "
            "untouched: free space there or choose another run.dir"
        ) from error
    ranks.first(lambda: _prune(directory, prepared, check_turn))
    return SaveResult(
        step=step,
        path=path,
        bytes=sum(manifest.file_bytes.values()) + manifest_bytes,
        seconds=time.perf_counter() - start_s,
    )


def _start(directory: Path, prepared: Prepared, check_turn: Callable[[], None] | None) -> Path:
    if check_turn is None:
        folders.clear(directory)
    else:
        check_turn()
    return folders.start(directory, prepared.step, prepared.needed_bytes)


def _ask_again(check_turn: Callable[[], None] | None) -> None:
    with suppress(OSError):  # a disk that does not even say whose turn it is
        if check_turn is not None:
            check_turn()


def _prune(directory: Path, prepared: Prepared, check_turn: Callable[[], None] | None) -> None:
    if check_turn is not None:
        check_turn()
    folders.prune(directory, prepared.step, prepared.keep_last)


def _write_mine(
    folder: Path | None,
    prepared: Prepared,
    chunk_of: Callable[[ChunkWrite], Tensor],
    rank: int,
) -> tuple[list[str], dict[str, int]]:
    assert folder is not None
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} was made by rank 0 and is not here: use a shared file system"
        )
    return write_shards(folder, prepared.plan.writes[rank], prepared.plan.tensors, chunk_of)


def _describe(
    tensors: Mapping[str, Tensor],
    mine: Mapping[str, Tensor],
    state: dict[str, Any],
    keep_last: int,
) -> dict[str, Piece]:
    """This rank's pieces, or all that keeps them from being saved."""
    problems = json_problems(state, "state")
    if keep_last < 1:
        problems.append(f"keep_last={keep_last} must be at least 1")
    pieces: dict[str, Piece] = {}
    for name, tensor in mine.items():
        if name in tensors and name.startswith(RANK_PREFIX):
            problems.append(f"{name}: names must not begin with {RANK_PREFIX}: rename it")
        try:
            pieces[name] = local_piece(name, tensor)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(itemize("cannot save", problems))
    return pieces


def _manifest(
    step: int,
    state: dict[str, Any],
    plan: SavePlan,
    written: list[tuple[list[str], dict[str, int]]],
) -> Manifest:
    chunks: dict[str, list[Chunk]] = {name: [] for name in plan.tensors}
    for writes, (hashes, _) in zip(plan.writes, written, strict=True):
        for write, digest in zip(writes, hashes, strict=True):
            chunks[write.name].append(
                Chunk(file=write.file, key=write.key, region=write.region, xxh3_128=digest)
            )
    return Manifest(
        step=step,
        world_size=len(plan.writes),
        state=state,
        tensors={
            name: TensorRecord(
                dtype=layout.dtype,
                shape=layout.shape,
                grid=layout.grid,
                chunks=tuple(sorted(chunks[name], key=lambda chunk: chunk.region.offsets)),
            )
            for name, layout in sorted(plan.tensors.items())
        },
        file_bytes={file: size for _, sizes in written for file, size in sizes.items()},
    )


def abandon(directory: Path, unfinished: Path | None) -> int:
    """Remove what was written; return the bytes then free on the file system."""
    if unfinished is not None:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folders.free_bytes(directory)
