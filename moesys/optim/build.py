"""AdamW over dense and expert parameters."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moesys.config.schema import OptimConfig
from moesys.ops.shard import set_rows_like


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW (2.x has it on CPU too). Matrices decay, vectors do not; with frozen experts nothing does.

    Parameters of different meshes are in groups of their own: torch's fused update takes one mesh at a time.
    """
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        key = (parameter.ndim > 1 and config.frozen_experts is None, mesh)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
            for (decays, _), parameters in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state under canonical names `optim.PARAMETER.exp_avg`, ..., created if not there yet."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            set_rows_like(state[key], parameter)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensors[f"optim.{name}.{key}"] = state[key]
    return tensors
