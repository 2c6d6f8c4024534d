"""A run that a new checkpoint is made of: its configuration and one of its checkpoints."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint.errors import itemize
from moesys.checkpoint.folder import checkpoints_at
from moesys.checkpoint.manifest import Manifest, read_manifest
from moesys.checkpoint.weights import WEIGHTS, weight_tensors
from moesys.config.build import to_dict
from moesys.config.compose import load_resolved
from moesys.config.schema import ModelConfig, RunConfig
from moesys.grow.change import Shapes, TensorShape
from moesys.models.transformer import Transformer

CONFIG, DATA_MANIFEST = "config.yaml", "data_manifest.json"


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    run: Path
    """The folder with config.yaml."""
    folder: Path
    """The checkpoint."""
    config: RunConfig
    manifest: Manifest

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def shapes(self) -> Shapes:
        """Of its weights."""
        return {
            name: TensorShape(dtype=record.dtype, shape=record.shape)
            for name, record in self.manifest.tensors.items()
            if name.startswith(WEIGHTS)
        }

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        """What is known of it: size and hash. All sources of a run have one."""
        folders = self.config.data.folders.values()
        for path in (self.run / DATA_MANIFEST, *(Path(f) / "manifest.json" for f in folders)):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
                said = json.loads(path.read_bytes())
                of_one = next(iter(said["sources"].values())) if "sources" in said else said
                return dict(of_one["tokenizer"])
        return None


def open_part(path: Path, name: str | None = None) -> Part:
    """The newest checkpoint of the run `path`, or the checkpoint that it is.

    Raises:
        ValueError: there is none, or no config.yaml with it.
        CheckpointError: a damaged manifest.
    """
    folder = checkpoints_at(path)[0]
    places = [
        place for place in (folder.parent.parent, folder.parent) if (place / CONFIG).is_file()
    ]
    if not places:
        raise ValueError(
            f"{folder} has no {CONFIG} above it: name a run folder, or a checkpoint inside one"
        )
    config = load_resolved(places[0] / CONFIG)
    if memory := list(config.model.memory_layers.layers):
        raise ValueError(
            f"{places[0] / CONFIG}: model.memory_layers.layers={memory} must be []: models with memory layers are "
            "neither upcycled, merged nor pruned"
        )
    if config.model.moe_layers and config.model.share_depth != "none":
        raise ValueError(
            f"{places[0] / CONFIG}: model.share_depth={config.model.share_depth} must be none: layers that share "
            "their experts are neither merged nor pruned"
        )
    if config.model.moe_layers and config.model.moe.expert_widths is not None:
        raise ValueError(
            f"{places[0] / CONFIG}: model.moe.expert_widths must be null: experts of different widths are neither "
            "merged nor pruned"
        )
    part = Part(
        name=name or config.run.name,
        run=places[0],
        folder=folder,
        config=config,
        manifest=read_manifest(folder),
    )
    if part.shapes != shapes_of(config.model):
        raise ValueError(f"{folder} does not hold the weights of the model in {places[0] / CONFIG}")
    return part


def shapes_of(model: ModelConfig) -> Shapes:
    """What a checkpoint of such a model holds of it. Raises ValueError for what its router refuses."""
    with torch.device("meta"):
        built = Transformer(model)
    return {
        name: TensorShape(dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))
        for name, t in weight_tensors(built).items()
    }


def refuse_unlike(parts: Sequence[Part], ignored: Sequence[str]) -> None:
    """Raises ValueError with every key of `model` but `ignored`, and every tokenizer, that is not the first's."""
    first, problems = parts[0], list[str]()
    known = [(part, part.tokenizer) for part in parts]
    for part, tokenizer in known[1:]:
        for key, here, there in _differences(first.model, part.model, ignored):
            problems.append(f"{key} is {here} in {first.run}, {there} in {part.run}")
        if tokenizer and known[0][1] and tokenizer["xxh3"] != known[0][1]["xxh3"]:
            problems.append(
                f"the tokenizer is {known[0][1]['xxh3']} in {first.run}, {tokenizer['xxh3']} in {part.run}"
            )
    if problems:
        raise ValueError(itemize("these runs cannot be merged", problems))


def _differences(
    a: ModelConfig, b: ModelConfig, ignored: Sequence[str]
) -> list[tuple[str, object, object]]:
    of_a, of_b = _leaves(a), _leaves(b)
    return [
        (key, of_a.get(key), of_b.get(key))
        for key in sorted(of_a.keys() | of_b.keys())
        if of_a.get(key) != of_b.get(key) and not key.startswith(tuple(ignored))
    ]


def _leaves(model: ModelConfig) -> dict[str, object]:
    found: dict[str, object] = {}
    for field in fields(model):
        value = getattr(model, field.name)
        if field.name != "moe":
            found[f"model.{field.name}"] = value
            continue
        for key, inner in to_dict(value).items():
            found |= (
                {f"model.moe.{key}.{name}": leaf for name, leaf in inner.items()}
                if isinstance(inner, dict)
                else {f"model.moe.{key}": inner}
            )
    return found
