"""What a router must hold to, checked on numbers: at the start of a job, and by a user's own tests.

Shapes: T tokens, D model, E experts, K slots per token, N slots of a blend.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from moesys.config.schema import ComponentConfig, ModelConfig, MoEConfig, RunConfig
from moesys.moe.component import build_router, takes
from moesys.moe.routing import RoutingResult
from moesys.moe.tokens import Tokens
from moesys.plan.batch.local import LocalPiece, LocalPieces

NO_CODECS: Mapping[str, ComponentConfig] = MappingProxyType({})


class ContractError(ValueError):
    """A router breaks a rule; says which class and which rule."""


def check_configured(model: ModelConfig, codecs: Mapping[str, ComponentConfig] = NO_CODECS) -> None:
    """The router of a configuration, as its first MoE layer has it, before anything depends on it. `codecs` that its rows may
    have, by key.

    Raises ContractError, also where it does not go with the rest of the layer, or with layers of other numbers of experts.
    """
    if not model.moe_layers:
        return
    first, *others = [model.moe_of(layer) for layer in model.moe_layers]
    num_layers = 1 + len(others)
    router = build_router(first, model.d_model, 0, num_layers)
    result = check_router(router, model.d_model, first.num_choices)
    if problem := blend_problem(first, result, codecs):
        raise ContractError(problem)
    for place, moe in enumerate(others, 1):
        if moe.num_experts == first.num_experts:
            continue
        with torch.device("meta"):
            other = build_router(moe, model.d_model, place, num_layers)
        if handed_on(other) != handed_on(router):
            raise ContractError(
                f"model.moe.router._target_={moe.router.target} hands on to other layers what depends on the number of "
                f"experts, {first.num_experts} in MoE layer 0 and {moe.num_experts} in MoE layer {place}: use "
                "model.moe.experts_by_layer=null, or another router"
            )


def check_run_config(config: RunConfig) -> None:
    """`check_configured` of a whole configuration."""
    check_configured(config.model, config.dispatch.codecs if config.parallel.ep > 1 else NO_CODECS)


def handed_on(router: nn.Module) -> tuple[int, list[torch.Size]]:
    """The shapes of what layers have in common: the state's width, and parameters of modules over depth."""
    modules = [router.get_submodule(name) for name in getattr(router, "over_depth", ())]
    shapes = [parameter.shape for module in modules for parameter in module.parameters()]
    return getattr(router, "state_dim", 0), shapes


def blend_problem(
    config: MoEConfig,
    result: RoutingResult,
    codecs: Mapping[str, ComponentConfig] = NO_CODECS,
) -> str | None:
    """What a router that blends tokens, and chooses no expert, cannot go with."""
    if result.blend is None:
        return None
    if config.balance.has_loss:
        return (
            f"model.moe.router._target_={config.router.target} blends tokens, so that load is always even, and "
            "model.moe.balance has a balance loss: use balance=none"
        )
    if config.num_choices > config.num_experts:
        return (
            f"model.moe.router._target_={config.router.target} blends tokens and chooses no expert: set "
            "model.moe.zero_experts, copy_experts and constant_experts to 0"
        )
    if codecs:
        key, codec = next(iter(codecs.items()))
        return (
            f"{key}={codec.target} is of tokens, and model.moe.router._target_={config.router.target} sends "
            "blends of them: use codec=none"
        )
    return None


def route(
    router: nn.Module,
    x_TD: Tensor,
    state: Tensor | None = None,
    seed: int = 1,
    tokens: Tokens | None = None,
) -> RoutingResult:
    """Call it as the layer does, on one sequence or what `tokens` says. Raises ContractError if it cannot be called so, or raises."""
    tokens = tokens or some_tokens(len(x_TD))
    known = {"tokens": tokens} if takes(router.forward, "tokens") else {}
    signature = inspect.signature(router.forward)
    try:
        signature.bind(x_TD, state, **known)
    except TypeError as error:
        raise ContractError(
            f"{_name(router)}: forward must take (x_TD, state) or (x_TD, state, tokens), takes {signature}: {error}"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return router(x_TD, state, **known)
        except Exception as error:  # a user's class may raise anything
            raise ContractError(
                f"{_name(router)}: forward raised {type(error).__name__}: {error}"
            ) from error


def some_tokens(num_tokens: int) -> Tokens:
    """One sequence of T tokens with ids of their own."""
    ids_T = torch.arange(num_tokens) * 7919 % 50_257
    return Tokens(num_tokens=num_tokens, seq_len=max(1, num_tokens), ids_T=ids_T)


def some_pieces(num_tokens: int) -> Tokens:
    """The same, of two sequences of any length."""
    first = num_tokens // 3
    pieces = LocalPieces(tuple(LocalPiece(n, (0,), 0) for n in (first, num_tokens - first)))
    return replace(some_tokens(num_tokens), seq_len=None, pieces=pieces)


def check_router(
    router: nn.Module, d_model: int, num_experts: int, num_tokens: int = 16
) -> RoutingResult:
    """Route random numbers, with random parameters and in training. Overwrites the parameters; returns the first result.

    Raises ContractError naming the class and every rule that it breaks.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    x_TD = torch.randn(num_tokens, d_model, generator=generator).requires_grad_()
    result = route(router, x_TD)
    broken = list(broken_rules(router, result, num_tokens, num_experts))
    if not broken:
        broken += _broken_on_replay(router, x_TD, result)
        broken += _broken_under_autocast(router, x_TD)
        broken += _broken_on_pieces(router, x_TD)
    results = [result]
    if not broken and result.state is not None:  # as the next layer's router is called
        state = result.state
        results.append(route(router, x_TD, state if state.requires_grad else _leaf(state)))
        broken += broken_rules(router, results[-1], num_tokens, num_experts)
    if not broken and num_tokens > 1:
        broken += _broken_gradients(router, results)
    if broken:
        raise ContractError(f"{_name(router)}: {'; '.join(broken)}")
    return results[0]


def broken_rules(
    router: nn.Module, result: RoutingResult, num_tokens: int, num_experts: int
) -> Iterator[str]:
    """Of shapes, types and ranges; with reads of the numbers."""
    if not isinstance(result, RoutingResult):
        yield f"forward must return a RoutingResult, not {type(result).__name__}"
        return
    ids, weights = result.topk_ids_TK, result.topk_weights_TK
    per_token = (num_tokens, num_experts)
    slots = tuple(ids.shape) if result.blend is not None else (num_tokens, *ids.shape[1:])
    wrong = list(
        _wrong_tensors(
            topk_ids_TK=(ids, torch.int64, slots),
            topk_weights_TK=(weights, torch.float32, slots),
            logits_TE=(result.logits_TE, torch.float32, per_token),
            probs_TE=(result.probs_TE, torch.float32, per_token),
        )
    )
    if ids.ndim != 2:
        wrong.append(f"topk_ids_TK must be [T, K], is {list(ids.shape)}")
    yield from wrong
    if wrong:
        return
    if not bool(((ids >= -1) & (ids < num_experts)).all()):
        yield f"topk_ids_TK must lie in -1..{num_experts - 1}, have {ids.min()}..{ids.max()}"
    ordered = ids.sort(dim=-1)[0]
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        yield "the experts of a token must be distinct in topk_ids_TK"
    if bool((weights[ids < 0] != 0).any()):
        yield "topk_weights_TK must be 0 where the id is -1"
    sums_T = result.probs_TE.sum(-1)
    if not torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-4):
        yield "probs_TE must sum to 1 over experts"
    learns = any(p.requires_grad for p in router.parameters()) and torch.is_grad_enabled()
    if learns and result.blend is None and not weights.requires_grad:
        yield "topk_weights_TK must come from the parameters with a gradient, not detached"
    extra = result.extra_loss
    if extra is not None and (extra.ndim or (num_tokens and not bool(torch.isfinite(extra)))):
        yield f"extra_loss must be a finite scalar, is {list(extra.shape)}"
    yield from _wrong_state(router, result, num_tokens)


def _wrong_tensors(**expected: tuple[Tensor, torch.dtype, tuple[int, ...]]) -> Iterator[str]:
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype:
            yield f"{name} must be {dtype}, is {tensor.dtype}"
        if tuple(tensor.shape) != shape:
            yield f"{name} must be {list(shape)}, is {list(tensor.shape)}"
        if not bool(torch.isfinite(tensor).all()):
            yield f"{name} must be finite numbers"


def _wrong_state(router: nn.Module, result: RoutingResult, num_tokens: int) -> Iterator[str]:
    state_dim = getattr(router, "state_dim", 0)
    if result.state is None:
        if state_dim:
            yield f"the router has state_dim={state_dim} and gives no state"
        return
    if tuple(result.state.shape) != (num_tokens, state_dim):
        expected = [num_tokens, state_dim]
        yield f"state must be [T, state_dim] = {expected}, is {list(result.state.shape)}"
    if result.state.dtype != torch.float32:
        yield f"state must be fp32, is {result.state.dtype}"


def _broken_on_replay(router: nn.Module, x_TD: Tensor, result: RoutingResult) -> Iterator[str]:
    again = route(router, x_TD)
    for name in ("topk_ids_TK", "topk_weights_TK"):
        if not torch.equal(getattr(again, name), getattr(result, name)):
            yield f"the same input and random state must give the same routing, {name} differs"


def _broken_under_autocast(router: nn.Module, x_TD: Tensor) -> Iterator[str]:
    """The experts are chosen in fp32 whatever products compute in."""
    x_TD = x_TD.detach().bfloat16().float()
    expected = route(router, x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        found = route(router, x_TD)
    for name in ("topk_ids_TK", "topk_weights_TK"):
        if not torch.equal(getattr(found, name), getattr(expected, name)):
            yield f"routing must be fp32 under autocast (torch.autocast(..., enabled=False)), {name} differs"


def _broken_on_pieces(router: nn.Module, x_TD: Tensor) -> Iterator[str]:
    """So that a configuration with pieces of sequences is refused before anything depends on it."""
    if getattr(router, "needs_whole_sequences", False):
        return
    try:
        route(router, x_TD, tokens=some_pieces(len(x_TD)))
    except ContractError as error:
        yield f"needs_whole_sequences must be True in the class, for with pieces of sequences {error}"


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _broken_gradients(router: nn.Module, results: Sequence[RoutingResult]) -> Iterator[str]:
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), requires_grad=True)
    for result in results:
        loss = loss + result.logits_TE.square().sum()
        for tensor in (result.topk_weights_TK, result.probs_TE, result.state):
            if tensor is not None:
                loss = loss + (tensor * torch.rand(tensor.shape, generator=generator)).sum()
        if result.extra_loss is not None:
            loss = loss + result.extra_loss
    named = [(n, p) for n, p in router.named_parameters() if p.requires_grad]
    if not named:
        return
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    missing = [n for (n, _), g in zip(named, gradients, strict=True) if g is None or not g.any()]
    if missing:
        yield f"no gradient reaches {', '.join(missing)}"


def _name(router: nn.Module) -> str:
    return f"{type(router).__module__}.{type(router).__qualname__}"
