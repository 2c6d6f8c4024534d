"""Our routers against other people's on the same logits, ties included: the same experts, with the same weights.

Transformers' routers of Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V2 and DeepSeek-V3, and megatron-core's top-k and losses.
Shapes: T tokens, E experts, K experts per token.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from moesys.moe.contract import route
from moesys.moe.routers import GroupLimitedRouter, TopKRouter

T, E = 512, 16
transformers_is_there = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed"
)
megatron_is_there = pytest.mark.skipif(
    find_spec("megatron") is None, reason="megatron-core is not installed"
)


def logits(with_ties: bool) -> Tensor:
    """With ties most tokens have equal logits, some have all of them equal."""
    logits_TE = 2 * torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    if with_ties:
        logits_TE = (logits_TE / 2).round()
        logits_TE[:8] = 0.0
    return logits_TE


def ours(router: TopKRouter, logits_TE: Tensor, bias_E: Tensor | None = None):
    """Ids and weights; the router's matrix is the identity, so that logits are what it is given."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
        if bias_E is not None:
            router.selection_bias_E.copy_(bias_E)
        result = route(router, logits_TE)
    return result.topk_ids_TK, result.topk_weights_TK


def dense(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, E]: each expert's weight; -1 where it does not serve the token."""
    return torch.full((len(ids_TK), E), -1.0).scatter_(1, ids_TK, weights_TK.float())


def made(cls=TopKRouter, *, top_k: int, **options: Any) -> TopKRouter:
    return cls(d_model=E, num_experts=E, top_k=top_k, **options)


BIAS_E = torch.linspace(-0.3, 0.3, E)


def of_transformers(name: str, top_k: int) -> tuple[torch.nn.Module, TopKRouter, Tensor | None]:
    """Theirs, ours, and the selection bias of both."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.olmoe import modeling_olmoe as olmoe
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

    sizes = {"hidden_size": E, "num_experts_per_tok": top_k}
    if name == "mixtral":
        config = mixtral.MixtralConfig(num_local_experts=E, **sizes)
        return mixtral.MixtralTopKRouter(config), made(top_k=top_k), None
    if name.startswith("qwen3"):
        normalize = name == "qwen3"
        config = qwen.Qwen3MoeConfig(num_experts=E, norm_topk_prob=normalize, **sizes)
        router = made(top_k=top_k, normalize_weights=normalize)
        return qwen.Qwen3MoeTopKRouter(config), router, None
    if name == "olmoe":
        config = olmoe.OlmoeConfig(num_experts=E, norm_topk_prob=False, **sizes)
        return olmoe.OlmoeTopKRouter(config), made(top_k=top_k, normalize_weights=False), None
    config = v3.DeepseekV3Config(
        n_routed_experts=E, n_group=4, topk_group=2, routed_scaling_factor=2.5, **sizes
    )
    router = made(
        GroupLimitedRouter,
        top_k=top_k,
        num_groups=4,
        top_groups=2,
        group_score_top=2,
        score_function="sigmoid",
        scaling_factor=2.5,
    )
    return v3.DeepseekV3TopkRouter(config), router, BIAS_E


@transformers_is_there
@pytest.mark.parametrize("with_ties", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3", "qwen3, not normalised", "olmoe", "deepseek v3"]
)
def test_transformers(name, top_k, with_ties):
    theirs, router, bias_E = of_transformers(name, top_k)
    logits_TE = logits(with_ties)
    if bias_E is not None and with_ties:
        bias_E = (10 * bias_E).round() / 10  # scores with a bias tie too
    with torch.no_grad():
        theirs.weight.copy_(torch.eye(E))
        if bias_E is not None:
            theirs.e_score_correction_bias.copy_(bias_E)
        _, their_weights, their_ids = theirs(logits_TE)
    found, expected = dense(*ours(router, logits_TE, bias_E)), dense(their_ids, their_weights)
    assert torch.equal(found >= 0, expected >= 0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


MEGATRON = {
    "softmax, then top-k": (
        {"use_pre_softmax": True},
        {"normalize_weights": False},
    ),
    "top-k, then softmax": ({"use_pre_softmax": False}, {"normalize_weights": True}),
    "sigmoid": (
        {"score_function": "sigmoid", "scaling_factor": 2.5},
        {"score_function": "sigmoid", "scaling_factor": 2.5},
    ),
    "sigmoid with a bias": (
        {"score_function": "sigmoid", "expert_bias": BIAS_E},
        {"score_function": "sigmoid"},
    ),
    "sigmoid with a bias in groups": (
        {"score_function": "sigmoid", "expert_bias": BIAS_E, "num_groups": 4, "group_topk": 2},
        {"score_function": "sigmoid", "num_groups": 4, "top_groups": 2},
    ),
}


@megatron_is_there
@pytest.mark.parametrize("with_ties", [False, True])
@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_core(name, top_k, with_ties):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    their_options, options = MEGATRON[name]
    logits_TE = logits(with_ties)
    probs_TE, map_TE = topk_routing_with_score_function(logits_TE, top_k, **their_options)
    if "num_groups" in options:
        options = {**options, "group_score_top": top_k // 2}
    cls = GroupLimitedRouter if "num_groups" in options else TopKRouter
    found = dense(
        *ours(made(cls, top_k=top_k, **options), logits_TE, their_options.get("expert_bias"))
    )
    assert torch.equal(found >= 0, map_TE.bool())
    torch.testing.assert_close(found.clamp(min=0), probs_TE.float(), rtol=1e-6, atol=1e-7)
