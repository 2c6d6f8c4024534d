"""transformers' MixtralForCausalLM and Qwen3MoeForCausalLM, of the size and with the weights of a model of ours."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.transformers_layer import IMPLEMENTATIONS
from moesys.checkpoint.hf_config import config_to_hf, family_for
from moesys.checkpoint.hf_names import hf_tensors
from moesys.config.schema import ModelConfig, OptimConfig
from moesys.optim.build import build_optimizer

# batched_mm copies an expert's weights for every slot: out of memory at these token counts.
MODEL_IMPLEMENTATIONS = tuple(name for name in IMPLEMENTATIONS if name != "batched_mm")


class TransformersModel:
    """A causal LM that trains as a script on transformers would: SDPA, no cache, clip, fused AdamW.

    Shapes: B sequences of S tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        optim: OptimConfig,
        weights: Mapping[str, Tensor],
        implementation: str,
    ) -> None:
        """`weights`: parameters of our model by name; Qwen3-MoE with qk_norm, else Mixtral."""
        settings = config_to_hf(config, "float32")
        hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        hf_config.use_cache = False
        model: Any = AutoModelForCausalLM.from_config(
            hf_config, attn_implementation="sdpa", experts_implementation=implementation
        )
        there = dict(model.named_parameters())
        with torch.no_grad():
            for tensor in hf_tensors(config, family_for(config), "fused"):
                parameter = there.pop(tensor.name)
                parameter.copy_(weights[tensor.ours][tensor.index].reshape(parameter.shape))
        if there:
            raise RuntimeError(f"not given our weights: {', '.join(there)}")
        self.model = model.to(weights["embed.weight"].device).train()
        self.max_norm = optim.clip_grad_norm
        self.optimizer = build_optimizer(self.model, optim)

    def step(self, input_ids_BS: Tensor, target_ids_BS: Tensor) -> tuple[float, float]:
        """One optimizer step; mean loss in nats per token, and the gradient norm before clipping."""
        loss = self.model(
            input_ids=input_ids_BS, labels=target_ids_BS, shift_labels=target_ids_BS
        ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()
