"""What a run's rates are measured against: the model's size and work per token, the device's peak."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesys.models.transformer import Transformer
from moesys.plan.costs import active_parameters, total_parameters, training_flops_per_token
from moesys.train.peak import peak_tflops
from moesys.train.setup import Run


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """As the start record has it."""

    parameters: int
    active_parameters: int
    flops_per_token: int
    """Of training: forward and backward."""
    peak_tflops: float
    """Of one rank's device; nan on ranks other than 0."""
    peak_source: str

    flops_per_pair: float
    """Of `flops_per_token` what a sequence that is one token longer adds."""
    seq_len: int
    """That `flops_per_token` is for."""

    def flops_at(self, length_tokens: float) -> float:
        """Of a token in a sequence of this length."""
        return self.flops_per_token + (length_tokens - self.seq_len) * self.flops_per_pair

    def fields(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("flops_per_pair", "seq_len")
        }

    def sizes(self) -> dict[str, int]:
        return {"parameters": self.parameters, "active_parameters": self.active_parameters}


def yardstick(run: Run, dtype: torch.dtype) -> Yardstick:
    """Rank 0 multiplies large matrices of `dtype` for under 0.5 s, unless it is known what that gives."""
    config = run.config
    with torch.device("meta"):  # this rank may have no MoE layer
        router_parameters = Transformer(config.model).router_parameters()
    tflops, source = peak_tflops(run, dtype)
    seq_len = config.data.seq_len
    flops, of_none = (
        training_flops_per_token(config.model, length, router_parameters) for length in (seq_len, 0)
    )
    return Yardstick(
        parameters=total_parameters(config.model, router_parameters),
        active_parameters=active_parameters(config.model, router_parameters),
        flops_per_token=flops,
        flops_per_pair=(flops - of_none) / seq_len,
        seq_len=seq_len,
        peak_tflops=tflops,
        peak_source=source,
    )
