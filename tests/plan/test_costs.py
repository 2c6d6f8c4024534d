"""The formulas against the real model: parameters counted, FLOPs counted by torch."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesys.config.schema import ComponentConfig, MemoryLayersConfig, ModelConfig, MoEConfig
from moesys.models.mtp import targets_ahead
from moesys.models.transformer import Transformer
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.plan.costs import (
    active_parameters,
    expert_parameters,
    forward_flops_per_token,
    total_parameters,
    training_flops_per_token,
)

MODEL = ModelConfig(
    vocab_size=96,
    num_layers=3,
    num_dense_layers=1,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    d_ffn=48,
    moe=MoEConfig(
        num_experts=8,
        top_k=2,
        d_expert=16,
        num_shared_experts=1,
        router=ComponentConfig(target="moesys.moe.routers.TopKRouter"),
    ),
)
VARIANTS = {
    "base": MODEL,
    "tied": replace(MODEL, tie_embeddings=True),
    "qk norm, own head dim": replace(MODEL, qk_norm=True, head_dim=16),
    "all dense": replace(MODEL, num_dense_layers=3),
    "all MoE, no shared": replace(
        MODEL, num_dense_layers=0, moe=replace(MODEL.moe, num_shared_experts=0)
    ),
    "latent experts": replace(MODEL, moe=replace(MODEL.moe, d_latent=8)),
    "weighed shared expert": replace(MODEL, moe=replace(MODEL.moe, shared_gate="sigmoid")),
    "residual MoE, latent": replace(
        MODEL, moe=replace(MODEL.moe, shared_gate="softmax", d_latent=24, num_shared_experts=2)
    ),
    "two tokens ahead": replace(MODEL, mtp_depth=2),
    "one ahead, tied, all dense": replace(
        MODEL, mtp_depth=1, tie_embeddings=True, num_dense_layers=3
    ),
    "same head count": replace(MODEL, num_kv_heads=4),
    "pyramid": replace(MODEL, moe=replace(MODEL.moe, experts_by_layer=(4, 8))),
    "shared experts and router": replace(MODEL, num_layers=4, share_depth="moe"),
    "shared depth": replace(MODEL, num_layers=4, share_depth="all", attention_experts=2),
    "attention experts": replace(MODEL, attention_experts=3),
    "of shared keys": replace(MODEL, attention_experts=3, attention_experts_kv="shared"),
    # Even routing, under which a token's mean width is d_expert.
    "experts of different widths": replace(
        MODEL,
        moe=replace(
            MODEL.moe,
            expert_widths=(4, 28),
            router=ComponentConfig(target="moesys.moe.routers.RoundRobinRouter"),
        ),
    ),
}


NULL = replace(MODEL, moe=replace(MODEL.moe, constant_experts=6, copy_experts=1, zero_experts=1))


def test_half_of_the_choices_have_no_feed_forward():
    with torch.device("meta"):
        model = Transformer(NULL)
    assert total_parameters(NULL) == sum(p.numel() for p in model.parameters())
    idle = (8 - 1) * expert_parameters(NULL)  # one of two slots goes to an expert
    assert active_parameters(NULL) == total_parameters(NULL) - 2 * idle
    more = 2 * 2 * (3 * 6 + 8) * 32  # of two layers: constants, rows of the router
    less = 2 * 2 * expert_parameters(NULL)
    assert forward_flops_per_token(NULL, 24) == forward_flops_per_token(MODEL, 24) + more - less


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_model(variant):
    config = VARIANTS[variant]
    with torch.device("meta"):
        model = Transformer(config)
    assert total_parameters(config) == sum(p.numel() for p in model.parameters())
    classes = [experts for layer in model.moe_layers() for experts in layer.experts.classes()]
    experts = sum(len(of_class.gate_up) for of_class in classes)
    idle = experts - config.moe.top_k * len(config.moe_layers)
    unshared = total_parameters(replace(config, share_depth="none"))
    assert active_parameters(config) == unshared - idle * expert_parameters(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_that_torch_counts(variant):
    config = VARIANTS[variant]
    batch, seq_len = 2, 24
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    set_expert_backend(model, "loop")
    ids = torch.randint(0, config.vocab_size, (batch, seq_len))
    # The counter knows the CPU's flash attention not at all, but its spelled-out form.
    ahead = targets_ahead(ids, config.mtp_depth) if config.mtp_depth else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, _, *of_depths = model(ids, targets_BSN=ahead)
    forward = batch * seq_len * forward_flops_per_token(config, seq_len)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        torch.stack([logits, *of_depths]).sum().backward()
    assert counter.get_total_flops() == 2 * forward


MEMORY = MemoryLayersConfig(
    layers=(1,), num_keys=8, top_k=3, d_key=6, d_value=12, d_pre=4, rank=2, heads=2
)


@pytest.mark.parametrize(
    "memory",
    [
        MEMORY,
        replace(MEMORY, layers=(1, 2), d_pre=0, rank=3, heads=1),
    ],
)
def test_memory_layers_are_counted(memory: MemoryLayersConfig):
    """But for the choice among values, and for sums of values, which torch's counter does not see."""
    config = replace(MODEL, memory_layers=memory)
    model = Transformer(config)
    assert total_parameters(config) == sum(p.numel() for p in model.parameters())
    number, of_value = len(memory.layers), memory.d_value + memory.d_pre
    idle = number * (memory.num_keys**2 - memory.top_k) * of_value
    moe = (2 - number) * 6 * expert_parameters(config)
    assert active_parameters(config) == total_parameters(config) - idle - moe
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    set_expert_backend(model, "loop")
    batch, seq_len = 2, 24
    ids = torch.randint(0, config.vocab_size, (batch, seq_len))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(ids)[0]
    k, r, n = memory.top_k, memory.rank, memory.num_keys
    unseen = batch * seq_len * number * 2 * k * memory.d_value
    per_token = 2 * r * n + k * r * r + k * k * r
    pair = 7 * r**3 + 2 * r * r  # powers of the core, and two products with a vector
    choice = number * 2 * (batch * seq_len * per_token + pair)
    forward = batch * seq_len * forward_flops_per_token(config, seq_len)
    # Products with a vector are counted where they are products of matrices.
    assert 0 <= forward - unseen + choice - counter.get_total_flops() <= number * 4 * r * r
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == 2 * (forward - unseen)


def test_backward_is_twice_the_forward():
    assert training_flops_per_token(MODEL, 64) == 3 * forward_flops_per_token(MODEL, 64)
