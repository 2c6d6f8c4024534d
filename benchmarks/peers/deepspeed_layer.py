"""DeepSpeed's MoE layer without dropping: experts padded to the fullest one, in one process or spread over the ranks of a job.

k = 2 is its top2gating with the sampling of the second expert off, k > 2 its topkgating; both normalise the
weights. k = 1 keeps the raw probability, so it is another function than ours and refused.
"""

import logging
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.moe_layer import LayerShape, LayerWeights, gradient

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

from deepspeed.comm import init_distributed  # noqa: E402  (reads the variable above)
from deepspeed.moe.layer import MoE  # noqa: E402


class _SwiGLU(nn.Module):
    """Gate and up as one product, as in ours."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DeepSpeedLayer:
    """deepspeed.moe.layer.MoE holding a copy of `weights`: of all experts, or of those of this rank of `ep_size`."""

    def __init__(self, shape: LayerShape, weights: LayerWeights, ep_size: int = 1) -> None:
        if shape.top_k < 2:
            raise ValueError(f"top_k={shape.top_k}: DeepSpeed normalises the weights from k = 2 on")
        self.moe = MoE(
            shape.d_model,
            _SwiGLU(shape.d_model, shape.d_expert),
            num_experts=shape.num_experts,
            ep_size=ep_size,
            k=shape.top_k,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        ).to(device=weights.router_ED.device, dtype=weights.router_ED.dtype)
        if ep_size > 1:
            init_distributed()
            self.moe.set_deepspeed_parallelism()
        layer: Any = self.moe.deepspeed_moe
        self.router = layer.gate.wg.weight
        self.experts = [(e.gate_up.weight, e.down.weight) for e in layer.experts.deepspeed_experts]
        with torch.no_grad():
            self.router.copy_(weights.router_ED)
            for i, (gate_up, down) in enumerate(self.experts):
                gate_up.copy_(weights.gate_up_E2FD[i])
                down.copy_(weights.down_EDF[i])

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.moe(x_TD)[0]

    def parameters(self) -> list[Tensor]:
        return list(self.moe.parameters())

    def gradients(self) -> LayerWeights:
        return LayerWeights(
            router_ED=gradient(self.router),
            gate_up_E2FD=torch.stack([gradient(gate_up) for gate_up, _ in self.experts]),
            down_EDF=torch.stack([gradient(down) for _, down in self.experts]),
        )
