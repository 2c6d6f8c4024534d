"""What a run's rates are measured against: the model's size and work per token, the device's peak."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesys.models.transformer import Transformer
from moesys.plan.costs import active_parameters, total_parameters, training_flops_per_token
from moesys.profile.matmul import matmul_tflops
from moesys.train.setup import Run


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """As the start record has it."""

    parameters: int
    active_parameters: int
    flops_per_token: int
    """Of training: forward and backward."""
    peak_tflops: float
    """Of one rank's device."""
    peak_source: str

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    def sizes(self) -> dict[str, int]:
        return {"parameters": self.parameters, "active_parameters": self.active_parameters}


def yardstick(run: Run, dtype: torch.dtype) -> Yardstick:
    """Multiplies large matrices of `dtype` for under 0.5 s, unless metrics.peak_tflops says what that gives."""
    config = run.config
    with torch.device("meta"):  # this rank may have no MoE layer
        router_parameters = Transformer(config.model).router_parameters()
    peak_tflops, peak_source = config.metrics.peak_tflops, "set by metrics.peak_tflops"
    if peak_tflops is None:
        peak_tflops = matmul_tflops(run.process.device, dtype)
        peak_source = f"measured, a large {config.train.dtype} matrix product on rank 0"
    return Yardstick(
        parameters=total_parameters(config.model, router_parameters),
        active_parameters=active_parameters(config.model, router_parameters),
        flops_per_token=training_flops_per_token(
            config.model, config.data.seq_len, router_parameters
        ),
        peak_tflops=peak_tflops,
        peak_source=peak_source,
    )
