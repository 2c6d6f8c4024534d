"""Import and export of Mixtral and Qwen3-MoE checkpoints: config.json and safetensors, one tensor at a time."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesys.checkpoint.errors import itemize
from moesys.checkpoint.hf_config import (
    config_to_hf,
    family_for,
    family_of,
    is_topk_router,
    model_config_from_hf,
    read_hf_config,
)
from moesys.checkpoint.hf_names import HfTensor, Style, hf_tensors
from moesys.checkpoint.region import Region
from moesys.checkpoint.shards import local_piece, local_tensor
from moesys.config.schema import ModelConfig

__all__ = ["load_hf", "model_config_from_hf", "save_hf"]

MAX_FILE_BYTES = 4 << 30
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SELECTION_BIAS = ".router.selection_bias_E"
_IGNORED = ".rotary_emb.inv_freq"
"""Old checkpoints carry this table; it follows from the configuration."""


def load_hf(folder: Path, model: nn.Module, config: ModelConfig) -> None:
    """Fill `model`, built of `config`, from the Hugging Face checkpoint in `folder`; selection biases become 0.

    Parameters may be DTensors in any Shard or Replicate placement: each rank reads only its rows. Values are
    converted to the parameter's dtype. Beyond the model, one tensor at a time is in memory.

    Raises:
        ValueError: before anything is filled: every unknown, missing or misshapen tensor, every setting in
            which `config` differs from config.json.
    """
    hf = read_hf_config(folder)
    family = family_of(hf)
    parameters = dict(model.named_parameters())
    with _HfFolder(folder) as source:
        fused = any(name.endswith(".experts.gate_up_proj") for name in source.file_of)
        style: Style = "fused" if fused else "per_expert"
        entries = hf_tensors(config, family, style)
        problems = _settings_problems(model_config_from_hf(folder), config)
        problems += _name_problems(entries, source, parameters, config)
        if problems:
            raise ValueError(
                itemize(f"{folder} does not fit the model", problems)
                + "\nBuild the model from model_config_from_hf(folder)"
            )
        for entry in entries:
            _fill(entry, source, parameters[entry.ours])
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(_SELECTION_BIAS):
                buffer.zero_()


def save_hf(tensors: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained(folder)` loads: Qwen3-MoE with qk_norm, else Mixtral.

    Args:
        tensors: parameters (and buffers) of a model of `config` by name, whole, all of one dtype.
        folder: must not exist yet; it appears when it is complete.

    Raises:
        ValueError: every setting and tensor that the family cannot express.
    """
    entries = hf_tensors(config, family_for(config), "per_expert")
    problems = _export_problems(tensors, entries, config)
    if problems:
        raise ValueError(itemize("cannot export to Hugging Face", problems))
    hf = config_to_hf(config, str(tensors["embed.weight"].dtype).removeprefix("torch."))
    if folder.exists():
        raise ValueError(f"{folder} exists: name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    beside.mkdir()
    try:
        (beside / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        _write_tensors(beside, tensors, entries)
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


class _HfFolder:
    """The tensors of model.safetensors, or of the files that an index names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open_files = ExitStack()
        self._files: dict[str, Any] = {}
        self.file_of: dict[str, str] = {}
        if (folder / _INDEX).exists():
            self.file_of = json.loads((folder / _INDEX).read_text())["weight_map"]
            for name in set(self.file_of.values()):
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise ValueError(
                        f"{folder / _INDEX}: {name!r} must be a .safetensors file beside it"
                    )
        elif (folder / _SINGLE).exists():
            self.file_of = dict.fromkeys(self._file(_SINGLE).keys(), _SINGLE)
        else:
            raise ValueError(
                f"{folder} has neither {_SINGLE} nor {_INDEX}: convert it to safetensors"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._open_files.close()

    def slice(self, name: str) -> Any:
        """A lazy tensor: get_shape, get_dtype, and [rows] that reads."""
        file = self.file_of[name]
        try:
            return self._file(file).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.folder / file}: {name}: {error}") from error

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                opened = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / name} cannot be read: {error}") from error
            self._files[name] = self._open_files.enter_context(opened)
        return self._files[name]


def _fill(entry: HfTensor, source: _HfFolder, parameter: Tensor) -> None:
    """Copy this rank's part of one HF tensor."""
    mine = local_piece(entry.ours, parameter)
    depth, shape = len(entry.index), tuple(parameter.shape)
    theirs = Region(
        offsets=(*entry.index, *(0 for _ in shape[depth:])), shape=(1,) * depth + shape[depth:]
    )
    for region in mine.regions:
        common = theirs.intersect(region)
        if common is None:
            continue
        # Joined halves leave the first dim as it is, so rows can be cut before the others are.
        rows, *others = common.within(theirs)[depth:]
        part = source.slice(entry.name)[rows].reshape(-1, *shape[depth + 1 :])
        local_tensor(parameter)[mine.within(common)].copy_(part[(slice(None), *others)])


def _settings_problems(hf_model: dict[str, Any], config: ModelConfig) -> list[str]:
    """Settings that change what the same weights compute; sizes show in the tensors' shapes."""
    router = config.moe.router
    here = {
        # Their layers may differ.
        "model.share_depth": (config.share_depth, "none"),
        "model.attention_experts": (config.attention_experts, 1),
        "model.rope_theta": (config.rope_theta, hf_model["rope_theta"]),
        "model.norm_eps": (config.norm_eps, hf_model["norm_eps"]),
        "model.num_heads": (config.num_heads, hf_model["num_heads"]),
        "model.moe.top_k": (config.moe.top_k, hf_model["moe"]["top_k"]),
    }
    if is_topk_router(router.target):
        defaults = {"score_function": "softmax", "normalize_weights": True}
        for name, default in defaults.items():
            have = router.options.get(name, default)
            here[f"model.moe.router.{name}"] = (have, hf_model["moe"]["router"][name])
    return [
        f"{key}={have} must be {want}, as in config.json"
        for key, (have, want) in here.items()
        if have != want
    ]


def _name_problems(
    entries: list[HfTensor],
    source: _HfFolder,
    parameters: Mapping[str, Tensor],
    config: ModelConfig,
) -> list[str]:
    expected = {entry.name: entry for entry in entries}
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    there = {n for n in source.file_of if n not in ignored and not n.endswith(_IGNORED)}
    problems = [f"{name} is not in the checkpoint" for name in expected if name not in there]
    problems += [f"{name} is only in the checkpoint" for name in sorted(there - expected.keys())]
    covered = {entry.ours for entry in entries}
    problems += [f"{n} has no counterpart there" for n in parameters if n not in covered]
    problems += [f"{n} is not in the model" for n in sorted(covered - parameters.keys())]
    for name, entry in expected.items():
        if name not in there or entry.ours not in parameters:
            continue
        have = tuple(source.slice(name).get_shape())
        want = entry.hf_shape(tuple(parameters[entry.ours].shape))
        if have != want:
            problems.append(f"{name} is {list(have)}, {entry.ours} needs {list(want)}")
    return problems


def _export_problems(
    tensors: Mapping[str, Tensor], entries: list[HfTensor], config: ModelConfig
) -> list[str]:
    needed = {entry.ours for entry in entries}
    ignored = {"head.weight"} if config.tie_embeddings else set()
    problems = [f"{name} is missing" for name in sorted(needed - tensors.keys())]
    dtypes = sorted({str(tensors[name].dtype) for name in needed & tensors.keys()})
    if len(dtypes) > 1:
        problems.append(f"tensors are of {' and '.join(dtypes)}: convert them to one type")
    ahead = ("mtp.", *(f"layers.{i}." for i in range(config.num_layers, config.total_layers)))
    for name, tensor in tensors.items():
        if name.startswith(ahead):
            continue  # the decoder works without
        if isinstance(tensor, DTensor):
            problems.append(f"{name} is sharded: gather it first")
        elif name.endswith(_SELECTION_BIAS):
            if tensor.any():
                problems.append(f"{name} is not 0: neither family has a selection bias")
        elif name not in needed | ignored:
            problems.append(f"{name} has no counterpart there")
    return problems


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], entries: list[HfTensor]) -> None:
    """model.safetensors, or several files and an index above MAX_FILE_BYTES."""
    files: list[dict[str, Tensor]] = [{}]
    file_bytes = total_bytes = 0
    for entry in entries:
        tensor = tensors[entry.ours].detach()[entry.index]
        if file_bytes and file_bytes + tensor.nbytes > MAX_FILE_BYTES:
            files.append({})
            file_bytes = 0
        files[-1][entry.name] = tensor
        file_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    count = len(files)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = [_SINGLE] if count == 1 else names
    for name, content in zip(names, files, strict=True):
        in_host_memory = {key: tensor.cpu().contiguous() for key, tensor in content.items()}
        specs = {
            key: TensorSpec(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=list(tensor.shape),
                data_ptr=tensor.data_ptr(),
                data_len=tensor.nbytes,
            )
            for key, tensor in in_host_memory.items()
        }
        serialize_file(specs, folder / name, metadata={"format": "pt"})
    if count > 1:
        weight_map = {
            key: name for name, content in zip(names, files, strict=True) for key in content
        }
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
