"""Which gradients are still partial when backward is done, and over which ranks they are to be summed."""

from collections.abc import Collection, Mapping

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from moesys.parallel.gradients import lies_with_experts
from moesys.parallel.mesh import Meshes

SEES_A_SHARE = (
    *(".moe.router.", ".moe.shared.", ".moe.shared_gate.", ".moe.latent."),
    *(".moe.null_experts.", ".memory."),
    *(".q_norm.", ".k_norm."),
)
"""Whole parameters that, without sequence parallelism, still see only a tp rank's tokens or heads."""


def gradient_sums(
    parameters: Mapping[str, nn.Parameter],
    meshes: Meshes,
    *,
    zero: int,
    sequence_parallel: bool,
    whole_on_owners: Collection[nn.Parameter] = (),
) -> list[tuple[dist.ProcessGroup, list[nn.Parameter]]]:
    """(group, parameters whose gradients every rank of it holds a part of), in an order common to all ranks.

    What FSDP reduces is left out, which is all with `zero` but what is `whole_on_owners`. A parameter cut over tp has seen all of its tp ranks' tokens; a whole one, only
    this rank's.
    """
    sums: dict[str, tuple[dist.ProcessGroup, list[nn.Parameter]]] = {
        "experts": (meshes.edp_group, []),
        "cut": (meshes.replica_group, []),
        "whole": (meshes.stage_group, []),
        "tp": (meshes.tp_group, []),
    }
    for name, parameter in parameters.items():
        is_expert = lies_with_experts(name)
        is_whole = zero == 0 or parameter in whole_on_owners
        is_cut = is_cut_over_tp(parameter)
        is_partial_over_tp = not is_cut and (sequence_parallel or _sees_a_share(name))
        if not is_whole:
            kind = "tp" if is_partial_over_tp and not is_expert else None
        elif is_expert:
            kind = "experts"
        else:
            kind = "whole" if is_partial_over_tp else "cut"
        if kind is not None:
            sums[kind][1].append(parameter)
    return [
        (group, found) for group, found in sums.values() if found and dist.get_world_size(group) > 1
    ]


def _sees_a_share(name: str) -> bool:
    is_of_routers = name.startswith("over_depth.") and not name.startswith("over_depth.attn.")
    return is_of_routers or any(part in name for part in SEES_A_SHARE)


def is_cut_over_tp(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ())
