"""Save and load named tensors in a form that knows no parallelism.

A plain tensor is one that every rank holds alike; a DTensor is held in shards. On disk there is only the
whole tensor, cut into chunks: any number of ranks in any layout reads what it needs of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.checkpoint import folder as folders
from moesys.checkpoint.errors import CheckpointError, CheckpointMismatch, itemize
from moesys.checkpoint.folder import latest
from moesys.checkpoint.manifest import RANK_PREFIX, Manifest, read_manifest
from moesys.checkpoint.plan import Piece
from moesys.checkpoint.ranks import Ranks
from moesys.checkpoint.region import Region
from moesys.checkpoint.save import SaveResult, save
from moesys.checkpoint.shards import ShardReader, local_piece, local_tensor

__all__ = ["LoadedState", "SaveResult", "Skipped", "latest", "load", "load_latest_good", "save"]


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A checkpoint that was found bad."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class LoadedState:
    path: Path
    step: int
    state: dict[str, Any]
    rank_tensors: dict[str, Tensor] | None
    """This rank's, on the CPU; None if another number of ranks saved them."""
    bytes_read: int
    """Chunk bytes that this rank needed to fill its tensors."""
    skipped: tuple[Skipped, ...] = ()
    """Newer checkpoints that could not be loaded, newest first."""


def load(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    under: str = "",
) -> LoadedState:
    """Fill `tensors` in place from the folder `path`, whatever layout saved it. Collective.

    All that a rank needs is read and verified before its first tensor changes, and then read again: a bad
    checkpoint changes nothing on any rank. The names of all ranks together must be those of the checkpoint that begin
    with `under`.

    Raises:
        CheckpointMismatch: every name, shape and dtype that differs from the checkpoint's.
        CheckpointError: every missing, cut or changed file, with the tensors in it. Same on all ranks.
    """
    ranks = Ranks(group)
    pieces = ranks.each(lambda: {name: local_piece(name, t) for name, t in tensors.items()})
    manifest = ranks.each(lambda: read_manifest(path))
    requested = {name for names in ranks.gather(list(pieces)) for name in names}
    ranks.each(lambda: _check_request(path, manifest, pieces, requested, under))

    outs = [
        (name, region, local_tensor(tensor)[pieces[name].within(region)])
        for name, tensor in tensors.items()
        for region in pieces[name].regions
        if region.numel
    ]
    own = _empty_rank_tensors(manifest, ranks)
    for name, tensor in (own or {}).items():
        outs.append(
            (f"{RANK_PREFIX}{ranks.rank}/{name}", Region.whole(tuple(tensor.shape)), tensor)
        )
    with ShardReader(path, manifest) as reader:
        ranks.each(lambda: _verify(reader, [(name, region) for name, region, _ in outs]))
        bytes_read = reader.bytes_read
        ranks.each(lambda: [reader.fill(*out) for out in outs])
        return LoadedState(
            path=path,
            step=manifest.step,
            state=manifest.state,
            rank_tensors=own,
            bytes_read=bytes_read,
        )


def load_latest_good(
    directory: Path, tensors: Mapping[str, Tensor], *, group: dist.ProcessGroup | None = None
) -> LoadedState | None:
    """Load the newest checkpoint that is good on every rank; None if `directory` has none at all. Collective.

    Raises:
        CheckpointMismatch: at the first that is of something else, as `load`.
        CheckpointError: there are checkpoints and all are bad.
    """
    skipped: list[Skipped] = []
    for path in Ranks(group).first(lambda: folders.step_folders(directory)):
        try:
            return replace(load(path, tensors, group=group), skipped=tuple(skipped))
        except CheckpointMismatch:
            raise
        except CheckpointError as error:
            skipped.append(Skipped(path=path, reason=str(error)))
    if skipped:
        raise CheckpointError(
            itemize(f"no good checkpoint in {directory}", [bad.reason for bad in skipped])
            + "\nRestore one of them, or start afresh in another run.dir"
        )
    return None


def _check_request(
    path: Path,
    manifest: Manifest,
    pieces: Mapping[str, Piece],
    requested: set[str],
    under: str,
) -> None:
    saved = {
        name: record
        for name, record in manifest.tensors.items()
        if name.startswith(under) and not name.startswith(RANK_PREFIX)
    }
    problems = [f"{name} is not in the checkpoint" for name in sorted(requested - saved.keys())]
    problems += [f"{name} is only in the checkpoint" for name in sorted(saved.keys() - requested)]
    for name in sorted(pieces.keys() & saved.keys()):
        here, there = pieces[name], saved[name]
        if (here.dtype, here.shape) != (there.dtype, there.shape):
            problems.append(
                f"{name} is {here.dtype} {list(here.shape)} here, "
                f"{there.dtype} {list(there.shape)} in the checkpoint"
            )
    if problems:
        raise CheckpointMismatch(
            itemize(f"{path} is of another model", problems)
            + "\nUse the model and optimizer settings that it was saved with, or another run.dir"
        )


def _empty_rank_tensors(manifest: Manifest, ranks: Ranks) -> dict[str, Tensor] | None:
    if manifest.world_size != ranks.size:
        return None
    prefix = f"{RANK_PREFIX}{ranks.rank}/"
    return {
        name.removeprefix(prefix): torch.empty(record.shape, dtype=getattr(torch, record.dtype))
        for name, record in manifest.tensors.items()
        if name.startswith(prefix)
    }


def _verify(reader: ShardReader, regions: Sequence[tuple[str, Region]]) -> None:
    """Read every chunk that fills `regions`; raise with all that is wrong."""
    needed = [
        (name, chunk) for name, region in regions for chunk in reader.overlapping(name, region)
    ]
    tensors_in: dict[str, list[str]] = {}
    for name, chunk in needed:
        tensors_in.setdefault(chunk.file, []).append(name)
    problems: list[str] = []
    for file, names in tensors_in.items():
        problem = reader.size_problem(file)
        if problem:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{problem} (it holds {', '.join(names[:3])}{more})")
    if not problems:
        for name, chunk in needed:
            try:
                reader.chunk(name, chunk)
            except CheckpointError as error:
                problems.append(str(error))
    if problems:
        raise CheckpointError(itemize(f"{reader.folder} is damaged", problems))
