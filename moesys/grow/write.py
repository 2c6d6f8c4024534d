"""Makes the tensors of a change one chunk at a time, and a run folder around them that can be trained.

OUT/config.yaml                    the configuration, with run.dir and checkpoint.init_from OUT
OUT/data_manifest.json             of the data that the first part was trained on, where it is known
OUT/step_00000000/                 the weights; no optimizer state
"""

import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesys.checkpoint.plan import ITEMSIZE_BYTES, MAX_CHUNK_BYTES, ChunkWrite, Piece, plan_save
from moesys.checkpoint.ranks import Ranks
from moesys.checkpoint.region import Region
from moesys.checkpoint.save import Prepared, write
from moesys.checkpoint.shards import ShardReader
from moesys.config.compose import to_yaml
from moesys.config.schema import ModelConfig, ParallelConfig, RunConfig
from moesys.config.validate import validate
from moesys.grow.change import Fill, NewTensor, Source, check_change
from moesys.grow.draw import chosen_units, normal
from moesys.grow.part import CONFIG, DATA_MANIFEST, Part, shapes_of
from moesys.models.transformer import Transformer
from moesys.plan.costs import active_parameters, total_parameters

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A checkpoint that can be written."""

    parts: Sequence[Part]
    model: ModelConfig
    tensors: Sequence[NewTensor]
    origin: Mapping[str, Any]
    """JSON: the operation, and which experts are from where."""

    def __post_init__(self) -> None:
        """Raises ValueError for a model that no run could have."""
        validate(replace(self.config(Path("out")), parallel=ParallelConfig()), world_size=1)
        check_change(self.tensors, shapes_of(self.model))

    @property
    def num_bytes(self) -> int:
        return sum(Region.whole(t.shape).numel * ITEMSIZE_BYTES[t.dtype] for t in self.tensors)

    @property
    def num_parameters(self) -> int:
        return total_parameters(self.model, self._router_parameters())

    @property
    def num_active(self) -> int:
        """Parameters that a token passes."""
        return active_parameters(self.model, self._router_parameters())

    def _router_parameters(self) -> list[int]:
        with torch.device("meta"):
            return Transformer(self.model).router_parameters()

    def config(self, out: Path) -> RunConfig:
        """The first part's, with this model, to be trained in `out`."""
        first = self.parts[0].config
        return replace(
            first,
            run=replace(first.run, name=out.name, dir=str(out)),
            model=self.model,
            checkpoint=replace(first.checkpoint, init_from=str(out)),
        )


def write_growth(
    growth: Growth,
    out: Path,
    on_progress: Progress = lambda done, total: None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> Path:
    """Make the run folder `out`, which must not exist yet and appears when it is complete; return its checkpoint.

    `on_progress(bytes_done, bytes_total)` is called after every chunk that is made. In memory are one chunk that is
    made, one that is read and what joins them: never more than six chunks.

    Raises:
        ValueError: `out` exists.
        CheckpointError: a part is damaged, or the disk full; nothing is left behind.
    """
    if out.exists():
        raise ValueError(f"{out} exists: name a new folder")
    pieces = {
        t.name: Piece(dtype=t.dtype, shape=t.shape, regions=(Region.whole(t.shape),))
        for t in growth.tensors
    }
    prepared = Prepared(
        step=0,
        state={"step": 0, "origin": dict(growth.origin)},
        keep_last=1,
        tensors={},
        pieces=pieces,
        plan=plan_save([pieces], max_chunk_bytes=max_chunk_bytes),
    )
    beside = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        with ExitStack() as opened:
            readers = [
                opened.enter_context(ShardReader(part.folder, part.manifest))
                for part in growth.parts
            ]
            maker = Maker(growth.tensors, readers, growth.num_bytes, on_progress)
            path = write(prepared, maker.chunk, beside, Ranks()).path
        (beside / CONFIG).write_text(to_yaml(growth.config(out)), encoding="utf-8")
        if (growth.parts[0].run / DATA_MANIFEST).is_file():
            shutil.copyfile(growth.parts[0].run / DATA_MANIFEST, beside / DATA_MANIFEST)
        os.replace(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out / path.name


@dataclass(kw_only=False)
class Maker:
    """Chunks of new tensors, from chunks of old ones."""

    tensors: Sequence[NewTensor]
    readers: Sequence[ShardReader]
    num_bytes: int
    on_progress: Progress
    done_bytes: int = 0
    _moments: dict[Source, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._of_name = {tensor.name: tensor for tensor in self.tensors}

    def chunk(self, write: ChunkWrite) -> Tensor:
        tensor = self._of_name[write.name]
        out = torch.empty(write.region.shape, dtype=getattr(torch, tensor.dtype))
        for fill in tensor.fills:
            common = fill.region.intersect(write.region)
            if common is not None:
                self._fill(fill, common, out[common.within(write.region)])
        self.done_bytes += out.nbytes
        self.on_progress(self.done_bytes, self.num_bytes)
        return out

    def _fill(self, fill: Fill, common: Region, out: Tensor) -> None:
        """Write the part `common` of a box into `out`, of its shape."""
        start = tuple(a - b for a, b in zip(common.offsets, fill.region.offsets, strict=True))
        part, box = Region(offsets=start, shape=common.shape), fill.region.shape
        if not fill.sources:
            out.zero_()
            if fill.draw_std:
                out.copy_(normal(fill.key, box, part) * fill.draw_std)
            return
        self._mean(fill.sources, part, out)
        if fill.noise:
            _, std = self._moments_of(fill.sources[0])
            out += normal(f"{fill.key}:noise", box, part) * (fill.noise * std)
        if fill.redrawn is not None:
            units = chosen_units(fill.redrawn.units_key, box[2], fill.redrawn.share)
            units = units[part.offsets[2] : part.offsets[2] + part.shape[2]]
            along = units.view(-1, *(1 for _ in box[3:])).expand(out.shape)
            mean, std = self._moments_of(fill.sources[0])
            out[along] = (normal(fill.key, box, part) * std + mean)[along]
        if fill.scale != 1.0:
            out *= fill.scale

    def _mean(self, sources: Sequence[Source], part: Region, out: Tensor) -> None:
        if len(sources) == 1:
            self._read(sources[0], part, out)
            return
        total = torch.zeros(out.shape, dtype=torch.float64)
        one = torch.empty_like(out)
        for source in sources:
            self._read(source, part, one)
            total += one
        out.copy_(total / len(sources))

    def _read(self, source: Source, part: Region, out: Tensor) -> None:
        """The part of a source's box that lies where `part` does in the new box, which may have more leading ones."""
        more = len(part.shape) - len(source.region.shape)
        length = part.shape[more:]
        at = zip(source.region.offsets, part.offsets[more:], strict=True)
        region = Region(offsets=tuple(a + b for a, b in at), shape=length)
        self.readers[source.part].fill(source.name, region, out.view(length))

    def _moments_of(self, source: Source) -> tuple[float, float]:
        """Mean and standard deviation of a source's box, a chunk at a time."""
        if source not in self._moments:
            total, squares = 0.0, 0.0
            reader = self.readers[source.part]
            for chunk in reader.overlapping(source.name, source.region):
                common = chunk.region.intersect(source.region)
                assert common is not None
                values = torch.empty(common.shape)
                reader.fill(source.name, common, values)
                total += values.sum(dtype=torch.float64).item()
                squares += values.double().square().sum().item()
            numel = source.region.numel
            mean = total / numel
            self._moments[source] = (mean, max(0.0, squares / numel - mean**2) ** 0.5)
        return self._moments[source]
