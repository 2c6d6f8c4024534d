"""The shapes that ops are tested and timed on.

Shapes: T tokens, K experts per token, N rows, D model, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    num_tokens: int
    top_k: int
    d_model: int
    num_experts: int
    dtype: torch.dtype = torch.float32
    dropped: float = 0.0
    """Share of slots without an expert."""

    def __str__(self) -> str:
        name = f"T{self.num_tokens}-K{self.top_k}-D{self.d_model}-E{self.num_experts}"
        drop = f"-drop{self.dropped:g}" if self.dropped else ""
        return f"{name}-{str(self.dtype).removeprefix('torch.')}{drop}"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    topk_ids_TK: Tensor
    weights_TK: Tensor
    x_TD: Tensor


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Distinct random experts per token, weights in 0..1, normal activations."""
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(case.num_tokens, case.num_experts, generator=generator)
    topk_ids_TK = scores_TE.topk(case.top_k, dim=1).indices
    is_dropped_TK = torch.rand(topk_ids_TK.shape, generator=generator) < case.dropped
    weights_TK = torch.rand(topk_ids_TK.shape, generator=generator)
    x_TD = torch.randn(case.num_tokens, case.d_model, generator=generator)
    return Inputs(
        topk_ids_TK=topk_ids_TK.masked_fill(is_dropped_TK, -1).to(device),
        weights_TK=weights_TK.to(device, torch.promote_types(case.dtype, torch.float32)),
        x_TD=x_TD.to(device, case.dtype),
    )


TESTED = [
    Case(num_tokens=64, top_k=2, d_model=64, num_experts=8),
    Case(num_tokens=33, top_k=3, d_model=65, num_experts=8, dropped=0.3),  # odd row length
    Case(
        num_tokens=700, top_k=4, d_model=24, num_experts=40, dropped=0.1
    ),  # several tiles of slots
    Case(num_tokens=5, top_k=6, d_model=300, num_experts=6),  # every expert for every token
    Case(num_tokens=1, top_k=1, d_model=1, num_experts=1),
    Case(num_tokens=0, top_k=2, d_model=16, num_experts=4),
    Case(num_tokens=9, top_k=2, d_model=16, num_experts=4, dropped=1.0),
    Case(num_tokens=50, top_k=2, d_model=40, num_experts=8, dtype=torch.float64),
    Case(num_tokens=50, top_k=8, d_model=520, num_experts=16, dtype=torch.bfloat16, dropped=0.2),
    Case(num_tokens=50, top_k=2, d_model=31, num_experts=8, dtype=torch.bfloat16),
    Case(num_tokens=50, top_k=2, d_model=48, num_experts=8, dtype=torch.float16),
]

TIMED = [
    Case(num_tokens=num_tokens, top_k=top_k, d_model=d_model, num_experts=num_experts)
    for num_tokens, top_k, d_model, num_experts in (
        (512, 2, 256, 8),
        (2048, 4, 512, 16),
        (4096, 8, 512, 64),
        (8192, 8, 1024, 64),
    )
]
