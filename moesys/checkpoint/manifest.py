"""manifest.json: what a checkpoint holds and where; manifest.xxh128 guards it (`xxh128sum -c` reads it too).

Both are read as untrusted input: plain JSON, every field checked, file names from a fixed pattern.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from moesys.checkpoint.errors import CheckpointError, itemize
from moesys.checkpoint.folder import fsync, naming
from moesys.checkpoint.plan import ITEMSIZE_BYTES, tiling_problem
from moesys.checkpoint.region import Region

FORMAT, VERSION = "moesys-checkpoint", 1
MANIFEST, DIGEST = "manifest.json", "manifest.xxh128"
RANK_PREFIX = "rank_tensors/"
"""Tensors of one rank are kept as `rank_tensors/{rank}/{name}`; no other name may start so."""

_FILE = re.compile(r"shard-\d{5,}(-\d{3,})?\.safetensors")
_HASH = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One box of a tensor, stored under `key` in `file`."""

    file: str
    key: str
    region: Region
    xxh3_128: str
    """Of its bytes, row-major, little-endian."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    dtype: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    """Shards along each dim when it was saved. Says nothing about how it can be loaded."""
    chunks: tuple[Chunk, ...]
    """They cover the tensor exactly once."""

    @property
    def num_bytes(self) -> int:
        return Region.whole(self.shape).numel * ITEMSIZE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    step: int
    world_size: int
    """Ranks that saved it."""
    state: dict[str, Any]
    """The caller's JSON."""
    tensors: Mapping[str, TensorRecord]
    file_bytes: Mapping[str, int]
    """Size of each shard file."""


def write_manifest(folder: Path, manifest: Manifest) -> int:
    """Write the manifest and its digest into `folder`; return their bytes."""
    text = json.dumps(_to_json(manifest), indent=1, ensure_ascii=True).encode()
    digest = _digest_line(text)
    for name, content in ((DIGEST, digest), (MANIFEST, text)):
        with naming(folder / name):
            (folder / name).write_bytes(content)
        fsync(folder / name)
    return len(text) + len(digest)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`'s manifest.

    Raises:
        CheckpointError: no checkpoint, a changed byte, another version, or a field that breaks its rule.
    """
    path = folder / MANIFEST
    try:
        text, digest = path.read_bytes(), (folder / DIGEST).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: {error.filename}: {error.strerror}; use another step"
        ) from error
    if digest != _digest_line(text):
        raise CheckpointError(
            f"{path} is damaged: its xxh3_128 is {xxhash.xxh3_128_hexdigest(text)}, {DIGEST} says "
            f"{digest[:32].decode(errors='replace')}; use another step"
        )
    try:
        return _from_json(json.loads(text))
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint manifest: {type(error).__name__}: {error}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error


def json_problems(value: Any, where: str) -> list[str]:
    """What JSON would refuse or silently change in `value`: keys that are not text, objects of other types."""
    if isinstance(value, dict):
        wrong = [f"{where} has the key {key!r}: use text" for key in value if type(key) is not str]
        return wrong + [p for key, v in value.items() for p in json_problems(v, f"{where}.{key}")]
    if isinstance(value, list | tuple):
        return [p for i, v in enumerate(value) for p in json_problems(v, f"{where}[{i}]")]
    if value is None or isinstance(value, str | int | float):
        return []
    return [f"{where} is a {type(value).__name__}, which JSON does not have: convert it"]


def _digest_line(text: bytes) -> bytes:
    return f"{xxhash.xxh3_128_hexdigest(text)}  {MANIFEST}\n".encode()


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "state": manifest.state,
        "files": dict(manifest.file_bytes),
        "tensors": {
            name: {
                "dtype": record.dtype,
                "shape": list(record.shape),
                "grid": list(record.grid),
                "chunks": [
                    {
                        "file": chunk.file,
                        "key": chunk.key,
                        "offsets": list(chunk.region.offsets),
                        "shape": list(chunk.region.shape),
                        "xxh3_128": chunk.xxh3_128,
                    }
                    for chunk in record.chunks
                ],
            }
            for name, record in manifest.tensors.items()
        },
    }


def _from_json(data: Any) -> Manifest:
    if (data["format"], data["version"]) != (FORMAT, VERSION):
        raise ValueError(
            f"it is {data['format']!r} version {data['version']!r}, this program reads "
            f"{FORMAT!r} version {VERSION}"
        )
    problems: list[str] = []
    for name in data["files"]:
        if not _FILE.fullmatch(name):
            problems.append(f"the file name {name!r} is not of the form shard-NNNNN.safetensors")
    tensors = {name: _record(name, entry, problems) for name, entry in data["tensors"].items()}
    unlisted = {c.file for record in tensors.values() for c in record.chunks} - set(data["files"])
    problems += [f"the file {name!r} is used but not listed" for name in sorted(unlisted)]
    if not isinstance(data["state"], dict):
        problems.append("state is not a section")
    if problems:
        raise ValueError(itemize("its content breaks the format", problems))
    return Manifest(
        step=_size(data["step"]),
        world_size=_size(data["world_size"]),
        state=data["state"],
        tensors=tensors,
        file_bytes={name: _size(size) for name, size in data["files"].items()},
    )


def _record(name: str, entry: Any, problems: list[str]) -> TensorRecord:
    chunks = tuple(
        Chunk(
            file=_text(chunk["file"]),
            key=_text(chunk["key"]),
            region=Region(offsets=_sizes(chunk["offsets"]), shape=_sizes(chunk["shape"])),
            xxh3_128=_text(chunk["xxh3_128"]),
        )
        for chunk in entry["chunks"]
    )
    record = TensorRecord(
        dtype=_text(entry["dtype"]),
        shape=_sizes(entry["shape"]),
        grid=_sizes(entry["grid"]),
        chunks=chunks,
    )
    if record.dtype not in ITEMSIZE_BYTES:
        problems.append(f"{name}: {record.dtype} is none of {', '.join(ITEMSIZE_BYTES)}")
    if any(not _HASH.fullmatch(chunk.xxh3_128) for chunk in chunks):
        problems.append(f"{name}: an xxh3_128 is not 32 hex digits")
    problem = tiling_problem(record.shape, [chunk.region for chunk in chunks])
    if problem:
        problems.append(f"{name}: its chunks {problem}")
    return record


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a size")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list of sizes")
    return tuple(_size(value) for value in values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value
