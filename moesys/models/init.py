"""Weights from the seed and the parameter's name alone: the same on every layout and device.

A stacked expert parameter [E, ...] is drawn expert by expert, so that a rank draws only its own.
"""

import torch
import xxhash
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.ops.shard import local_box, local_tensor

RESIDUAL_PROJECTIONS = ("attn.wo.weight", ".down")
"""Names that end so write into the residual stream; their std falls with depth (GPT-2)."""


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all parameters and buffers in place: norms 1, other vectors and buffers 0, the rest Normal(0, std)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = local_tensor(parameter)
            if parameter.ndim == 1:
                local.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            else:
                _draw(name, parameter, local, _std(name, config), seed)
        for _, buffer in model.named_buffers():
            buffer.zero_()


def _std(name: str, config: ModelConfig) -> float:
    if name.endswith(RESIDUAL_PROJECTIONS):
        return config.init_std / (2 * config.num_layers) ** 0.5
    return config.init_std


def _draw(name: str, parameter: Tensor, local: Tensor, std: float, seed: int) -> None:
    box = local_box(parameter)
    assert box is not None, f"{name}: this rank's part is no box of the whole"
    inside = tuple(slice(at, at + length) for at, length in zip(*box, strict=True))
    if ".experts." not in name:
        local.copy_(_normal(f"{seed}:{name}", parameter.shape, std)[inside])
        return
    for i in range(local.shape[0]):
        expert = inside[0].start + i
        local[i].copy_(_normal(f"{seed}:{name}:{expert}", parameter.shape[1:], std)[inside[1:]])


def _normal(key: str, shape: torch.Size, std: float) -> Tensor:
    """Drawn on the CPU in fp32 from a generator of its own, so the device does not matter."""
    generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(key.encode()) & (2**63 - 1))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
