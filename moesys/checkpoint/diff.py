"""Compare two checkpoints tensor by tensor, whatever layouts saved them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesys.checkpoint.manifest import RANK_PREFIX, Chunk, TensorRecord, read_manifest
from moesys.checkpoint.shards import ShardReader


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """How tensor `name` of B differs from that of A."""

    name: str
    mismatch: str | None = None
    """Why values cannot be compared: absent, or another shape or dtype."""
    num_different: int = 0
    """Elements that are not equal; NaN equals NaN, -0 equals 0."""
    max_abs: float = 0.0
    max_rel: float = 0.0
    """Of |a - b| / max(|a|, |b|)."""

    @property
    def is_equal(self) -> bool:
        return self.mismatch is None and self.num_different == 0


def diff(
    a: Path, b: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[TensorDifference]:
    """Compare the step folders `a` and `b`; one result per name of either, in order. Needs memory for three chunks.

    Ranks' own tensors are left out. `on_progress(bytes_done, bytes_total)` of A is called after every chunk.
    Raises CheckpointError if either is damaged.
    """
    manifest_a, manifest_b = read_manifest(a), read_manifest(b)
    total_bytes = sum(
        record.num_bytes
        for name, record in manifest_a.tensors.items()
        if not _mismatch(record, manifest_b.tensors.get(name)) and not name.startswith(RANK_PREFIX)
    )
    with ShardReader(a, manifest_a) as reader_a, ShardReader(b, manifest_b) as reader_b:
        for name in sorted(manifest_a.tensors.keys() | manifest_b.tensors.keys()):
            if name.startswith(RANK_PREFIX):
                continue
            record_a, record_b = manifest_a.tensors.get(name), manifest_b.tensors.get(name)
            mismatch = _mismatch(record_a, record_b)
            if mismatch or record_a is None:
                yield TensorDifference(name=name, mismatch=mismatch)
                continue
            parts = []
            for chunk in record_a.chunks:
                parts.append(_compare_chunk(name, chunk, reader_a, reader_b))
                on_progress(reader_a.bytes_read, total_bytes)
            yield TensorDifference(
                name=name,
                num_different=sum(part[0] for part in parts),
                max_abs=max((part[1] for part in parts), default=0.0),
                max_rel=max((part[2] for part in parts), default=0.0),
            )


def _mismatch(a: TensorRecord | None, b: TensorRecord | None) -> str | None:
    if a is None or b is None:
        return "only in B" if a is None else "only in A"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {list(a.shape)} in A, {b.dtype} {list(b.shape)} in B"
    return None


def _compare_chunk(
    name: str, chunk: Chunk, reader_a: ShardReader, reader_b: ShardReader
) -> tuple[int, float, float]:
    values_a = reader_a.chunk(name, chunk)
    values_b = torch.empty_like(values_a)
    reader_b.fill(name, chunk.region, values_b)
    return _compare(values_a, values_b)


def _compare(a: Tensor, b: Tensor) -> tuple[int, float, float]:
    """Count, max absolute and max relative difference; a NaN or infinity on one side only counts as inf."""
    differ = (a != b) & ~((a != a) & (b != b))
    if not differ.any():
        return 0, 0.0, 0.0
    a, b = a[differ].double(), b[differ].double()
    absolute = (a - b).abs().nan_to_num(nan=torch.inf)
    relative = (absolute / torch.maximum(a.abs(), b.abs())).nan_to_num(nan=torch.inf)
    return int(differ.sum()), absolute.max().item(), relative.max().item()
