"""Tensors to safetensors files and back; every chunk is hashed before it is written and after it is read."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesys.checkpoint.errors import CheckpointError
from moesys.checkpoint.folder import fsync
from moesys.checkpoint.manifest import Chunk, Manifest
from moesys.checkpoint.plan import ITEMSIZE_BYTES, ChunkWrite, Piece
from moesys.checkpoint.region import Region
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
    box = shard.local_box(tensor)
    if box is None:
        assert isinstance(tensor, DTensor)
        raise CheckpointError(
            f"{name} is placed {tensor.placements}: redistribute it to Shard or Replicate"
        )
    region = Region(offsets=box[0], shape=box[1])
    assert not region.numel or region.shape == tuple(local_tensor(tensor).shape), name
    return Piece(dtype=_DTYPES[tensor.dtype], shape=tuple(tensor.shape), region=region)


def write_shards(
    folder: Path,
    writes: Sequence[ChunkWrite],
    tensors: Mapping[str, Tensor],
    pieces: Mapping[str, Piece],
) -> tuple[list[str], dict[str, int]]:
    """Write one rank's chunks. Return the hash of each, in order, and the size in bytes of each file."""
    hashes: list[str] = []
    file_bytes: dict[str, int] = {}
    for file, group in groupby(writes, key=lambda write: write.file):
        specs: dict[str, TensorSpec] = {}
        in_host_memory: list[Tensor] = []
        for write in group:
            index = write.region.within(pieces[write.name].region)
            chunk = local_tensor(tensors[write.name])[index].cpu().contiguous()
            in_host_memory.append(chunk)
            hashes.append(hash_of(chunk))
            specs[write.key] = TensorSpec(
                dtype=_DTYPES[chunk.dtype],
                shape=list(chunk.shape),
                data_ptr=chunk.data_ptr(),
                data_len=chunk.nbytes,
            )
        path = folder / file
        try:
            serialize_file(specs, path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {error}") from error
        fsync(path)
        file_bytes[file] = path.stat().st_size
    return hashes, file_bytes


def hash_of(chunk: Tensor) -> str:
    """xxh3_128 of a contiguous CPU tensor's bytes, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(chunk.reshape(-1).view(torch.uint8).numpy().data)


class ShardReader:
    """Reads verified chunks of one checkpoint; keeps its files open until closed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.bytes_read = 0
        self._open_files = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._open_files.close()

    def size_problem(self, file: str) -> str | None:
        """What is wrong with a shard file before it is opened: missing, cut short, grown."""
        path = self.folder / file
        want = self.manifest.file_bytes[file]
        try:
            have = path.stat().st_size
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None if have == want else f"{path} has {have} bytes instead of {want}"

    def keys(self, file: str) -> set[str]:
        return set(self._file(file).keys())

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        """One chunk of tensor `name` as a CPU tensor of its own.

        Raises:
            CheckpointError: naming file and tensor, if the bytes are not those that were saved.
        """
        where = f"{self.folder / chunk.file}: {name} at {list(chunk.region.offsets)}"
        try:
            # A copy: what is hashed is what is returned, also if the file changes meanwhile.
            data: Tensor = self._file(chunk.file).get_tensor(chunk.key).clone()
        except (SafetensorError, OSError) as error:
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
            data = self.chunk(name, chunk)
            out[common.within(region)].copy_(data[common.within(chunk.region)])

    def _file(self, file: str) -> Any:
        if file not in self._files:
            opened = safe_open(self.folder / file, framework="pt")
            self._files[file] = self._open_files.enter_context(opened)
        return self._files[file]


def _show(dtype: str, shape: tuple[int, ...], digest: str) -> str:
    return f"{dtype} {list(shape)} {digest}"
