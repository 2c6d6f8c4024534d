"""Training that moves some experts and nothing else."""

from collections.abc import Iterable

from torch import Tensor, nn

from moesys.ops.shard import local_rows, local_tensor


def keep_frozen(parameters: Iterable[tuple[str, nn.Parameter]], frozen_experts: int) -> None:
    """Set gradients to 0, those of experts from `frozen_experts` on and of their rows of the router excepted.

    Of parameters by name, whatever ranks share them, once their gradients are summed. A gradient that was always 0
    leaves AdamW's moments at 0 and, without decay, its parameter as it was, bit for bit. No host sync.
    """
    for name, parameter in parameters:
        if parameter.grad is not None:
            _zero(name, parameter, parameter.grad, frozen_experts)


def has_row_per_expert(name: str) -> bool:
    """Whether dim 0 of a parameter counts experts: theirs, and what routers call `weight` or `noise_weight`."""
    return ".moe.experts." in name or name.endswith(
        (".moe.router.weight", ".moe.router.noise_weight")
    )


def _zero(name: str, parameter: nn.Parameter, grad: Tensor, frozen_experts: int) -> None:
    local = local_tensor(grad)
    if not has_row_per_expert(name):
        local.zero_()
        return
    local[: sum(row < frozen_experts for row in local_rows(parameter))].zero_()
