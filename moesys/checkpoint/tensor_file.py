"""One safetensors file, written and read a tensor at a time: never more than one of them is in memory.

8 bytes          length of the header, little-endian
the header       JSON: key -> dtype, shape, first and last byte; padded with spaces
the tensors      row-major, little-endian, without gaps

The format is https://github.com/huggingface/safetensors#format.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesys.checkpoint.errors import CheckpointError
from moesys.checkpoint.folder import naming
from moesys.checkpoint.plan import ITEMSIZE_BYTES

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {code: name for name, code in _CODES.items()}
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one tensor of a file is."""

    dtype: str
    """torch's name for it."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * ITEMSIZE_BYTES[self.dtype]


def write_tensors(path: Path, specs: Mapping[str, Spec], tensor_of: Callable[[str], Tensor]) -> int:
    """Write a new file and put it on the disk; return its bytes.

    `tensor_of(key)` is asked once for each key, for a contiguous CPU tensor that is as `specs` says.
    """
    # Widest first, so that each begins at a multiple of its width.
    keys = sorted(specs, key=lambda key: -ITEMSIZE_BYTES[specs[key].dtype])
    header, end = {}, 0
    for key in keys:
        start, end = end, end + specs[key].num_bytes
        header[key] = {
            "dtype": _CODES[specs[key].dtype],
            "shape": list(specs[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    with naming(path), path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in keys:
            # Without a name for the tensor, which would keep it while the next is asked for.
            num_bytes = file.write(bytes_of(tensor_of(key)))
            assert num_bytes == specs[key].num_bytes, key
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """An open file. It is untrusted: its header is checked, what its tensors hold is not.

    Read, not mapped: memory that a cut file no longer backs would kill the process.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError, or CheckpointError for a header that breaks the format."""
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self._entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, key: str) -> Tensor:
        """One tensor, a copy. Raises CheckpointError if the file has none of that name, or not all of it."""
        if key not in self._entries:
            raise CheckpointError(f"it has no tensor {key!r}")
        spec, start = self._entries[key]
        content = torch.empty(spec.num_bytes, dtype=torch.uint8)
        self._read(start, content.numpy().data)
        return content.view(getattr(torch, spec.dtype)).reshape(spec.shape)

    def _read_header(self) -> dict[str, tuple[Spec, int]]:
        file_bytes = os.fstat(self._descriptor).st_size
        length = bytearray(8)
        self._read(0, memoryview(length))
        header_bytes = int.from_bytes(length, "little")
        if header_bytes > file_bytes - 8:
            raise CheckpointError("its header is longer than the file")
        text = bytearray(header_bytes)
        self._read(8, memoryview(text))
        try:
            header = json.loads(text)
            return {
                key: _entry(entry, 8 + header_bytes, file_bytes)
                for key, entry in header.items()
                if key != "__metadata__"
            }
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            RecursionError,
        ) as error:
            raise CheckpointError(f"its header is damaged: {error}") from error

    def _read(self, start: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            count = os.preadv(self._descriptor, [out[done:]], start + done)
            if not count:
                raise CheckpointError(f"it ends at byte {start + done}")
            done += count


def _entry(entry: Any, data_start: int, file_bytes: int) -> tuple[Spec, int]:
    """A tensor of the header and the byte of the file where it begins."""
    sizes = [*entry["shape"], *entry["data_offsets"]]
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"{sizes} are not all sizes")
    spec = Spec(dtype=_DTYPES[entry["dtype"]], shape=tuple(entry["shape"]))
    start, end = (data_start + offset for offset in entry["data_offsets"])
    if end - start != spec.num_bytes or end > file_bytes:
        raise ValueError(f"bytes {start} to {end} do not hold {spec}")
    return spec, start
