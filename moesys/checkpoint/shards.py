"""Tensors to safetensors files and back; every chunk is hashed before it is written and after it is read."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Self

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesys.checkpoint.errors import CheckpointError
from moesys.checkpoint.manifest import Chunk, Manifest, TensorRecord
from moesys.checkpoint.plan import ITEMSIZE_BYTES, ChunkWrite, Piece, TensorLayout
from moesys.checkpoint.region import Region
from moesys.checkpoint.tensor_file import Spec, TensorFile, bytes_of, write_tensors
from moesys.ops import shard

_DTYPES = {getattr(torch, name): name for name in ITEMSIZE_BYTES}


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with `tensor`."""
    with torch.no_grad():
        return shard.local_tensor(tensor).detach()


def local_piece(name: str, tensor: Tensor) -> Piece:
    """What this rank holds of `tensor`: all of a plain one, its shard of a DTensor.

    Raises:
        CheckpointError: a dtype that a checkpoint cannot hold, or a DTensor whose local part is no box of
            the whole: a pending sum, or rows taken in strides.
    """
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(
            f"{name} is {tensor.dtype}, a checkpoint holds {', '.join(ITEMSIZE_BYTES)}: convert it"
        )
    boxes = shard.local_boxes(tensor)
    if boxes is None:
        assert isinstance(tensor, DTensor)
        raise CheckpointError(
            f"{name} is placed {tensor.placements}: redistribute it to Shard or Replicate"
        )
    regions = tuple(Region(offsets=offsets, shape=shape) for offsets, shape in boxes)
    assert sum(region.numel for region in regions) == local_tensor(tensor).numel(), name
    return Piece(dtype=_DTYPES[tensor.dtype], shape=tuple(tensor.shape), regions=regions)


def write_shards(
    folder: Path,
    writes: Sequence[ChunkWrite],
    tensors: Mapping[str, TensorLayout | TensorRecord],
    chunk_of: Callable[[ChunkWrite], Tensor],
) -> tuple[list[str], dict[str, int]]:
    """Write one rank's chunks. Return the hash of each, in order, and the size in bytes of each file.

    `chunk_of` is asked for one chunk after the other, as a contiguous CPU tensor.
    """
    hash_of_write: dict[ChunkWrite, str] = {}
    file_bytes: dict[str, int] = {}
    for file, group in groupby(writes, key=lambda write: write.file):
        of_key = {write.key: write for write in group}

        def take(key: str, of_key: Mapping[str, ChunkWrite] = of_key) -> Tensor:
            chunk = chunk_of(of_key[key])
            hash_of_write[of_key[key]] = hash_of(chunk)
            return chunk

        specs = {
            key: Spec(dtype=tensors[write.name].dtype, shape=write.region.shape)
            for key, write in of_key.items()
        }
        file_bytes[file] = write_tensors(folder / file, specs, take)
    return [hash_of_write[write] for write in writes], file_bytes


def hash_of(chunk: Tensor) -> str:
    """xxh3_128 of a contiguous CPU tensor's bytes, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(bytes_of(chunk))


class ShardReader:
    """Reads verified chunks of one checkpoint; keeps its files open until closed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.bytes_read = 0
        self._files: dict[str, TensorFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def size_problem(self, file: str) -> str | None:
        """What is wrong with a shard file before it is opened: missing, cut short, grown."""
        path = self.folder / file
        want = self.manifest.file_bytes[file]
        try:
            have = path.stat().st_size
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None if have == want else f"{path} has {have} bytes instead of {want}"

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        """One chunk of tensor `name` as a CPU tensor of its own.

        Raises:
            CheckpointError: naming file and tensor, if the bytes are not those that were saved.
        """
        where = f"{self.folder / chunk.file}: {name} at {list(chunk.region.offsets)}"
        try:
            # A copy: what is hashed is what is returned, also if the file changes meanwhile.
            data = self._file(chunk.file).read(chunk.key)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{where} cannot be read: {error}") from error
        self.bytes_read += data.nbytes
        want = (self.manifest.tensors[name].dtype, chunk.region.shape, chunk.xxh3_128)
        have = (_DTYPES.get(data.dtype, str(data.dtype)), tuple(data.shape), hash_of(data))
        if have != want:
            raise CheckpointError(
                f"{where} is damaged: it is {_show(*have)}, saved was {_show(*want)}"
            )
        return data

    def overlapping(self, name: str, region: Region) -> list[Chunk]:
        """The chunks of tensor `name` that hold a part of `region`."""
        chunks = self.manifest.tensors[name].chunks
        return [chunk for chunk in chunks if chunk.region.intersect(region) is not None]

    def fill(self, name: str, region: Region, out: Tensor) -> None:
        """Copy `region` of tensor `name` into `out`, a tensor of the region's shape on any device."""
        for chunk in self.overlapping(name, region):
            common = chunk.region.intersect(region)
            assert common is not None
            # Without a name for the chunk, which would keep it while the next is read.
            out[common.within(region)].copy_(self.chunk(name, chunk)[common.within(chunk.region)])

    def _file(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = TensorFile(self.folder / file)
        return self._files[file]


def _show(dtype: str, shape: tuple[int, ...], digest: str) -> str:
    return f"{dtype} {list(shape)} {digest}"
