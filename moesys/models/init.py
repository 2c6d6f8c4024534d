"""Weights from the seed and the parameter's name alone: the same on every layout and device.

A stacked expert parameter [E, ...] is drawn expert by expert, so that a rank draws only its own.
"""

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesys.config.schema import ModelConfig

RESIDUAL_PROJECTIONS = ("attn.wo.weight", ".down")
"""Names that end so write into the residual stream; their std falls with depth (GPT-2)."""


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all parameters and buffers in place: norms 1, other vectors and buffers 0, the rest Normal(0, std)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
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
    if ".experts." not in name:
        assert not isinstance(parameter, DTensor), f"{name}: only experts are sharded"
        local.copy_(_normal(f"{seed}:{name}", parameter.shape, std))
        return
    first = 0
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        first = mesh.get_local_rank() * local.shape[0]
    for i in range(local.shape[0]):
        local[i].copy_(_normal(f"{seed}:{name}:{first + i}", local.shape[1:], std))


def _normal(key: str, shape: torch.Size, std: float) -> Tensor:
    """Drawn on the CPU in fp32 from a generator of its own, so the device does not matter."""
    generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(key.encode()) & (2**63 - 1))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
