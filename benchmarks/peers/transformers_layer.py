"""transformers' Qwen3-MoE sparse block, with any of its experts implementations."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ExpertsInterface
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.peers.moe_layer import LayerShape, LayerWeights, gradient

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""batched_mm gathers a copy of the weights for every slot: only for small shapes (`fits_batched_mm`)."""
assert set(IMPLEMENTATIONS) - {"eager"} <= set(ExpertsInterface().keys())


def fits_batched_mm(shape: LayerShape, limit_bytes: int = 1 << 30) -> bool:
    """Whether the gathered weights (fp32, one copy per slot) stay under the limit."""
    return 12 * shape.num_tokens * shape.top_k * shape.d_model * shape.d_expert <= limit_bytes


class TransformersLayer:
    """Qwen3MoeSparseMoeBlock holding a copy of `weights`."""

    def __init__(self, shape: LayerShape, weights: LayerWeights, implementation: str) -> None:
        config = Qwen3MoeConfig(
            hidden_size=shape.d_model,
            moe_intermediate_size=shape.d_expert,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
            hidden_act="silu",
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.block: Any = Qwen3MoeSparseMoeBlock(config)
        self.block.to(weights.router_ED.dtype).to_empty(device=weights.router_ED.device)
        with torch.no_grad():
            self.block.gate.weight.copy_(weights.router_ED)
            self.block.experts.gate_up_proj.copy_(weights.gate_up_E2FD)
            self.block.experts.down_proj.copy_(weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.block(x_TD[None])[0]

    def parameters(self) -> list[Tensor]:
        return list(self.block.parameters())

    def gradients(self) -> LayerWeights:
        return LayerWeights(
            router_ED=gradient(self.block.gate.weight),
            gate_up_E2FD=gradient(self.block.experts.gate_up_proj),
            down_EDF=gradient(self.block.experts.down_proj),
        )
