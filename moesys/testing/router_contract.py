"""What every router must hold to, as a check that runs on a user's class.

    from moesys.testing import router_contract
    router_contract.check(lambda **sizes: MyRouter(**sizes, my_option=3))

Shapes: T tokens, D model, E experts, K experts per token.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn

from moesys.moe.routing import RoutingResult

SIZES = [(16, 8, 4, 2), (1, 8, 4, 1), (5, 12, 6, 6), (0, 8, 4, 2)]
"""(T, D, E, K): ordinary, one token, K = E, no token."""


def check(factory: Callable[..., nn.Module]) -> None:
    """Raise AssertionError naming the first rule that the router breaks.

    `factory(d_model=, num_experts=, top_k=)` makes one. The rules: shapes and types of RoutingResult; distinct
    experts per token, in range or -1; weight 0 where the id is -1; finite numbers; probabilities that sum to
    one; a gradient into every parameter, given a state if it hands one on; the same result for the same input;
    a state in fp32, of `state_dim` numbers per token.
    """
    for num_tokens, d_model, num_experts, top_k in SIZES:
        torch.manual_seed(0)
        router = factory(d_model=d_model, num_experts=num_experts, top_k=top_k)
        assert isinstance(router, nn.Module), "a router is a torch.nn.Module"
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.normal_(0.0, 0.5)
        x_TD = torch.randn(num_tokens, d_model, requires_grad=True)
        result = _route(router, x_TD)
        _check_result(result, num_tokens, num_experts, top_k)
        _check_state(router, result, num_tokens)
        _check_repeats(router, x_TD, result)
        if result.state is not None:  # as the next layer's router is called
            result = _route(router, x_TD, result.state)
            _check_result(result, num_tokens, num_experts, top_k)
        if num_tokens > 1:
            _check_gradients(router, result)


def _route(
    router: nn.Module, x_TD: torch.Tensor, state: torch.Tensor | None = None
) -> RoutingResult:
    parameters = list(inspect.signature(router.forward).parameters)
    assert parameters[:2] == ["x_TD", "state"], (
        f"forward takes (x_TD, state), not {parameters}: the layer calls router(x_TD, state)"
    )
    torch.manual_seed(1)
    result = router(x_TD, state)
    assert isinstance(result, RoutingResult), (
        f"forward returns a RoutingResult, not {type(result).__name__}"
    )
    return result


def _check_result(result: RoutingResult, num_tokens: int, num_experts: int, top_k: int) -> None:
    ids, weights = result.topk_ids_TK, result.topk_weights_TK
    expected = {
        "topk_ids_TK": (ids, torch.int64, (num_tokens, top_k)),
        "topk_weights_TK": (weights, torch.float32, (num_tokens, top_k)),
        "logits_TE": (result.logits_TE, torch.float32, (num_tokens, num_experts)),
        "probs_TE": (result.probs_TE, torch.float32, (num_tokens, num_experts)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, must be {dtype}"
        assert tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, must be {shape}"
        assert bool(torch.isfinite(tensor).all()), f"{name} has numbers that are not finite"
    assert bool(((ids >= -1) & (ids < num_experts)).all()), (
        f"topk_ids_TK lie in -1..{num_experts - 1}"
    )
    for row in ids.tolist():
        chosen = [expert for expert in row if expert >= 0]
        assert len(chosen) == len(set(chosen)), f"a token chose an expert twice: {row}"
    assert bool((weights[ids < 0] == 0).all()), "topk_weights_TK is 0 where the id is -1"
    sums = result.probs_TE.sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-4), "probs_TE sum to 1 over experts"
    if result.extra_loss is not None:
        assert result.extra_loss.ndim == 0, "extra_loss is a scalar"


def _check_state(router: nn.Module, result: RoutingResult, num_tokens: int) -> None:
    state_dim = getattr(router, "state_dim", 0)
    if result.state is None:
        assert not state_dim, f"the router has state_dim={state_dim} and gives no state"
        return
    shape, expected = tuple(result.state.shape), (num_tokens, state_dim)
    assert shape == expected, f"state is {shape}, must be (T, state_dim) = {expected}"
    assert result.state.dtype == torch.float32, f"state is {result.state.dtype}, must be fp32"


def _check_repeats(router: nn.Module, x_TD: torch.Tensor, result: RoutingResult) -> None:
    again = _route(router, x_TD)
    for name in ("topk_ids_TK", "topk_weights_TK"):
        same = torch.equal(getattr(again, name), getattr(result, name))
        assert same, f"the same input and random state give the same routing, {name} differs"


def _check_gradients(router: nn.Module, result: RoutingResult) -> None:
    loss = (result.topk_weights_TK * torch.rand_like(result.topk_weights_TK)).sum()
    loss = loss + (result.probs_TE * torch.rand_like(result.probs_TE)).sum()
    loss = loss + result.logits_TE.square().sum()
    if result.extra_loss is not None:
        loss = loss + result.extra_loss
    named = [(n, p) for n, p in router.named_parameters() if p.requires_grad]
    if not named:
        return
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    missing = [n for (n, _), g in zip(named, gradients, strict=True) if g is None or not g.any()]
    assert not missing, f"no gradient reaches {missing}"
