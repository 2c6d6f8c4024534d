"""The ops of the MoE layer, compiled from csrc/ where built, else in torch (`library.status()`)."""

from moesys.ops.order import expert_order, tokens_per_expert
from moesys.ops.permute import permute, unpermute
from moesys.ops.swiglu import swiglu

__all__ = ["expert_order", "permute", "swiglu", "tokens_per_expert", "unpermute"]
