"""How alike the experts of a layer are, and how differently texts use them.

Shapes: E experts, N sources.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from moesys.moe.experts import ExpertClasses, Experts
from moesys.moe.held_experts import HeldExperts
from moesys.ops.shard import local_rows, local_tensor

_SMALLEST = 1e-12


def layer_similarity(experts: Experts | ExpertClasses | HeldExperts) -> Tensor:
    """`mean_cosine` of a layer's experts; of several widths the mean over these, which are not compared to each other."""
    return torch.stack([mean_cosine(alike.parameters()) for alike in experts.classes()]).mean()


@torch.no_grad()
def mean_cosine(weights: Iterable[Tensor]) -> Tensor:
    """Mean cosine between two experts' weights over all pairs, an fp64 scalar: 0 = unrelated, 1 = copies, or one expert.

    `weights` are [E, ..]; a row of all of them is an expert's vector. With unit vectors u the mean over pairs is
    (|sum u|^2 - E) / (E (E - 1)), so no product of two experts is made. Of DTensors every rank of their mesh calls this,
    and a vector of one expert's size travels over the ranks that share out experts.
    """
    weights = list(weights)
    num_experts = weights[0].shape[0]
    if num_experts < 2:
        return torch.ones((), dtype=torch.float64, device=weights[0].device)
    squares_E = torch.stack([_squares(weight) for weight in weights]).sum(0)
    scale_E = squares_E.sqrt().clamp(min=_SMALLEST).reciprocal()
    total = torch.stack([_square_of_sum(weight, scale_E) for weight in weights]).sum()
    return (total - num_experts) / (num_experts * (num_experts - 1))


def divergence(loads: Sequence[Sequence[int]]) -> float:
    """How differently sources use the experts of a layer: the Jensen-Shannon divergence of their loads, bits.

    0 = alike; log2 of the number of sources = no expert in common.
    """
    shares = torch.tensor(loads, dtype=torch.float64)
    shares = shares / shares.sum(1, keepdim=True).clamp(min=1)
    mixed = torch.special.entr(shares.mean(0)).sum() - torch.special.entr(shares).sum(1).mean()
    return max(0.0, mixed.item()) / torch.log(torch.tensor(2.0)).item()


def _squares(weight: Tensor) -> Tensor:
    """Of every expert, its squared length in this tensor, fp64 [E]."""
    squares_E = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    for own, expert in zip(local_tensor(weight), local_rows(weight), strict=True):
        squares_E[expert] = own.double().square().sum()
    return _summed(squares_E, weight, of_experts=True, of_others=True)


def _square_of_sum(weight: Tensor, scale_E: Tensor) -> Tensor:
    """Squared length of the scaled experts' sum in this tensor."""
    local = local_tensor(weight)
    summed = local.new_zeros(local.shape[1:], dtype=torch.float64)
    for own, expert in zip(local, local_rows(weight), strict=True):
        summed += own.double() * scale_E[expert]
    summed = _summed(summed, weight, of_experts=True, of_others=False)
    return _summed(summed.square().sum(), weight, of_experts=False, of_others=True)


def _summed(part: Tensor, weight: Tensor, *, of_experts: bool, of_others: bool) -> Tensor:
    """`part` summed over the ranks that share out experts, or the other dims of `weight`, or both."""
    if isinstance(weight, DTensor):
        for axis, placement in enumerate(weight.placements):
            if isinstance(placement, Replicate) or weight.device_mesh.size(axis) == 1:
                continue
            dim = placement.dim  # type: ignore[attr-defined]
            if of_experts if dim == 0 else of_others:
                dist.all_reduce(part, group=weight.device_mesh.get_group(axis))
    return part
