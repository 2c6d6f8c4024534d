"""Each router against its formula in fp64, one token at a time: experts, weights, probabilities and all gradients.

Shapes: T tokens, D model, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moesys.moe import routers
from moesys.moe.contract import route
from moesys.moe.routing import RoutingResult, StepLoad
from moesys.moe.tokens import Tokens
from tests.moe.routers import reference
from tests.moe.routers.reference import Expected, Parameters

D = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A router with its options, and its formula."""

    router: Callable[..., nn.Module]
    expected: Callable[[Parameters, Tensor, int], Expected]
    options: dict[str, Any] = field(default_factory=dict)


def top_k(**options) -> Case:
    return Case(
        router=routers.TopKRouter,
        options=options,
        expected=lambda p, x, k: reference.top_k(
            reference.linear(p, x), k, bias=p["selection_bias_E"].tolist(), **options
        ),
    )


def grouped(score_function: str, group_score_top: int) -> Case:
    options = {"num_groups": 3, "top_groups": 2, "group_score_top": group_score_top}
    return Case(
        router=routers.GroupLimitedRouter,
        options={**options, "score_function": score_function},
        expected=lambda p, x, k: reference.top_k(
            reference.linear(p, x),
            k,
            score_function=score_function,
            bias=p["selection_bias_E"].tolist(),
            groups=(3, 2, group_score_top),
        ),
    )


CASES = {
    "softmax": top_k(),
    "softmax, not normalised": top_k(normalize_weights=False),
    "sigmoid, scaled": top_k(score_function="sigmoid", scaling_factor=2.5),
    "sigmoid, not normalised": top_k(score_function="sigmoid", normalize_weights=False),
    "device-limited": grouped("softmax", 1),
    "node-limited": grouped("sigmoid", 2),
    "cosine": Case(
        router=routers.CosineRouter,
        options={"projected_width": 3},
        expected=lambda p, x, k: reference.top_k(
            reference.cosine(p, x, 0.07), k, bias=p["selection_bias_E"].tolist()
        ),
    ),
    "recurrent, first layer": Case(
        router=routers.RecurrentRouter,
        options={"state_width": 5},
        expected=lambda p, x, k: reference.top_k(
            reference.recurrent(p, _within(p, "gru"), x, None)[0],
            k,
            bias=p["selection_bias_E"].tolist(),
        ),
    ),
    "pre-gated, first layer": Case(
        router=routers.PreGatedRouter,
        expected=lambda p, x, k: reference.top_k(
            reference.linear(p, x), k, bias=p["selection_bias_E"].tolist()
        ),
    ),
    "expert choice": Case(
        router=routers.ExpertChoiceRouter,
        options={"scaling_factor": 1.5},
        expected=lambda p, x, k: reference.expert_choice(p, x, k, 1.5),
    ),
    "relu": Case(router=routers.ReLURouter, expected=lambda p, x, k: reference.relu(p, x)),
    "noisy, evaluated": Case(
        router=lambda **options: routers.NoisyTopKRouter(**options).eval(),
        expected=lambda p, x, k: reference.top_k(
            reference.linear(p, x), k, bias=p["selection_bias_E"].tolist()
        ),
    ),
}


def _within(p: Parameters, module: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{module}."): v for n, v in p.items() if n.startswith(f"{module}.")}


def built(case: Case, num_experts: int, k: int, seed: int) -> nn.Module:
    router = case.router(d_model=D, num_experts=num_experts, top_k=k, **case.options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return router


def in_fp64(router: nn.Module) -> dict[str, Tensor]:
    named = [*router.named_parameters(), *router.named_buffers()]
    return {name: value.detach().double().requires_grad_() for name, value in named}


def chosen(result: RoutingResult) -> list[dict[int, Tensor]]:
    return [
        {e: w for e, w in zip(ids, weights, strict=True) if e >= 0}
        for ids, weights in zip(result.topk_ids_TK.tolist(), result.topk_weights_TK, strict=True)
    ]


def total(
    logits_TE: Tensor, weights: list[dict[int, Tensor]], probs_TE: Tensor, factors_3TE: Tensor
) -> Tensor:
    """A number in which everything counts, each entry by a factor of its own."""
    loss = (logits_TE * factors_3TE[0]).sum() + (probs_TE * factors_3TE[1]).sum()
    for t, row in enumerate(weights):
        for e, weight in row.items():
            loss = loss + weight * factors_3TE[2, t, e]
    return loss


def assert_formula(case: Case, num_tokens: int, num_experts: int, k: int, seed: int) -> None:
    router = built(case, num_experts, k, seed)
    p = in_fp64(router)
    generator = torch.Generator().manual_seed(seed + 1)
    x_TD = torch.randn(num_tokens, D, generator=generator).requires_grad_()
    x64_TD = x_TD.detach().double().requires_grad_()
    result, expected = route(router, x_TD), case.expected(p, x64_TD, k)
    found = chosen(result)
    assert [set(row) for row in found] == [set(row) for row in expected.weights]
    for ours, theirs in zip(found, expected.weights, strict=True):
        for expert, weight in theirs.items():
            assert ours[expert].item() == pytest.approx(weight.item(), rel=2e-5, abs=1e-7)
    torch.testing.assert_close(result.probs_TE.double(), expected.probs_TE, rtol=2e-5, atol=1e-7)
    factors = torch.randn(3, num_tokens, num_experts, generator=generator)
    ours = total(result.logits_TE, found, result.probs_TE, factors)
    theirs = total(expected.logits_TE, expected.weights, expected.probs_TE, factors.double())
    names = [n for n, parameter in router.named_parameters()]
    assert_gradients(
        ours,
        theirs,
        [*dict(router.named_parameters()).values(), x_TD],
        [*(p[n] for n in names), x64_TD],
    )


def assert_gradients(ours: Tensor, theirs: Tensor, of: list[Tensor], of_64: list[Tensor]) -> None:
    if not theirs.requires_grad:
        return
    found = torch.autograd.grad(ours, of, allow_unused=True)
    expected = torch.autograd.grad(theirs, of_64, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        zero = a is None or not a.any()
        if b is None:
            assert zero
        else:
            assert a is not None
            scale = b.abs().max().item() if b.numel() else 0.0
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * max(scale, 1e-3))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    assert_formula(CASES[name], num_tokens=11, num_experts=6, k=2, seed=0)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("name", CASES)
def test_any_sizes(name, data):
    if "limited" in name:
        num_experts = 3 * data.draw(st.integers(2, 3))
        k = data.draw(st.integers(1, 2 * num_experts // 3))
    else:
        num_experts = data.draw(st.integers(1, 9))
        k = data.draw(st.integers(1, num_experts))
    num_tokens, seed = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 10_000))
    assert_formula(CASES[name], num_tokens, num_experts, k, seed)


def test_a_recurrent_state_carries_values_and_gradients_over_layers():
    """Two layers, one GRU: the second one's logits from the first one's state, and back."""
    case = CASES["recurrent, first layer"]
    layers = [built(case, 6, 2, seed) for seed in (0, 1)]
    layers[1].__dict__["gru"] = layers[0].gru
    p = [in_fp64(layer) for layer in layers]
    gru = _within(p[0], "gru")
    generator = torch.Generator().manual_seed(9)
    x_TD = torch.randn(7, D, generator=generator).requires_grad_()
    x64_TD = x_TD.detach().double().requires_grad_()
    first = route(layers[0], x_TD)
    second = route(layers[1], x_TD, first.state)
    state = reference.recurrent(p[0], gru, x64_TD, None)[1]
    logits_TE, last = reference.recurrent(p[1], gru, x64_TD, state)
    torch.testing.assert_close(second.logits_TE.double(), logits_TE, rtol=1e-5, atol=1e-7)
    factors = torch.randn(7, 6, generator=generator)
    assert second.state is not None
    ours = (second.logits_TE * factors).sum() + second.state.sum()
    theirs = (logits_TE * factors).sum() + last.sum()
    names = [n for n, _ in layers[0].named_parameters() if n != "weight"]
    assert_gradients(
        ours,
        theirs,
        [*(layers[0].get_parameter(n) for n in names), x_TD],
        [*(p[0][n] for n in names), x64_TD],
    )


def test_the_l1_loss_of_relu_and_how_its_coefficient_moves():
    router = built(CASES["relu"], 6, 2, 3)
    assert isinstance(router, routers.ReLURouter)
    router.l1_raises.fill_(5.0)
    router.fractions_E.zero_()
    x_TD = torch.randn(9, D, generator=torch.Generator().manual_seed(4))
    load_ME = torch.tensor([[9, 9, 9, 9, 9, 9], [0, 3, 1, 2, 7, 5]])
    for f, raises in [([1.0] * 6, 5), ([6 / (2 * 9) * n for n in load_ME[1].tolist()], 6)]:
        assert router.l1_raises.item() == raises
        result, p = route(router, x_TD), in_fp64(router)
        expected = reference.relu_l1(reference.relu(p, x_TD.double()), f, 1e-8 * 1.2**raises)
        assert result.extra_loss is not None
        assert result.extra_loss.item() == pytest.approx(expected.item(), rel=1e-5)
        ours = torch.autograd.grad(result.extra_loss * 1e8, router.weight)[0]
        theirs = torch.autograd.grad(expected * 1e8, p["weight"])[0]
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-8)
        router.end_step(StepLoad(load_ME=load_ME, layer=1, num_tokens=9))
    for load_ME, raises in [(torch.full((2, 6), 1), 6), (torch.full((2, 6), 3), 6)]:
        router.end_step(StepLoad(load_ME=load_ME, layer=0, num_tokens=9))
        assert router.l1_raises.item() == raises


def test_soft_slots_and_their_gradients():
    """Two sequences; experts are matrices, so that what a slot is made of shows."""
    generator = torch.Generator().manual_seed(0)
    router = routers.SoftRouter(d_model=D, num_experts=3, top_k=1, slots_per_expert=2)
    matrices = torch.randn(3, D, D, generator=generator)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x_TD = torch.randn(8, D, generator=generator).requires_grad_()
    result = router(x_TD, None, Tokens(num_tokens=8, seq_len=4))
    assert result.blend is not None
    slots_ND = result.blend.slots(x_TD)
    rows = [m @ x for m, x in zip(matrices[result.topk_ids_TK[:, 0]], slots_ND, strict=True)]
    y_TD = result.blend.tokens(torch.stack(rows))
    p = in_fp64(router)
    x64_TD = x_TD.detach().double().requires_grad_()
    experts = [partial(torch.matmul, m) for m in matrices.double()]
    expected_TD = torch.cat(
        [reference.soft(p, x64_TD[s], experts, 2) for s in (slice(0, 4), slice(4, 8))]
    )
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=1e-5, atol=1e-6)
    factors = torch.randn(8, D, generator=generator)
    assert_gradients(
        (y_TD * factors).sum(),
        (expected_TD * factors).sum(),
        [router.phi, router.log_scale, x_TD],
        [p["phi"], p["log_scale"], x64_TD],
    )
