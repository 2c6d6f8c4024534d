"""What every router must hold to, as checks that run on a user's class.

    from moesys.testing import router_contract
    router_contract.check(lambda **sizes: MyRouter(**sizes, my_option=3))
    router_contract.check_layouts("my_package.MyRouter", {"my_option": 3})

Shapes: T tokens, D model, E experts, K experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moesys.config.schema import BalanceConfig, ComponentConfig, ParallelConfig
from moesys.moe.contract import check_router
from moesys.testing.layouts import BASE, LAYOUTS, MAX_ERROR, MICRO_STEPS
from moesys.testing.parity import compare, parity

SIZES = [(16, 8, 4, 2), (1, 8, 4, 1), (5, 12, 6, 6), (0, 8, 4, 2)]
"""(T, D, E, K): ordinary, one token, K = E, no token."""


def check(
    factory: Callable[..., nn.Module], sizes: Sequence[tuple[int, ...]] = tuple(SIZES)
) -> None:
    """Raise ContractError naming the class and the rules that it breaks.

    `factory(d_model=, num_experts=, top_k=)` makes one. The rules: shapes and types of RoutingResult; distinct
    experts per token, in range or -1; weight 0 where the id is -1; finite numbers; probabilities that sum to
    one; a gradient into every parameter, given a state if it hands one on; the same result for the same input and
    under autocast; a state in fp32, of `state_dim` numbers per token. Without tokens and with one, too.
    """
    for num_tokens, d_model, num_experts, top_k in sizes:
        torch.manual_seed(0)
        router = factory(d_model=d_model, num_experts=num_experts, top_k=top_k)
        if not isinstance(router, nn.Module):
            raise TypeError(f"a router is a torch.nn.Module, not {type(router).__name__}")
        check_router(router, d_model, num_experts, num_tokens)


def check_layouts(
    target: str,
    options: Mapping[str, Any] | None = None,
    *,
    layouts: Sequence[str] = ("tp", "cp", "pp", "ep"),
    steps: int = 3,
    balance: BalanceConfig | None = None,
    top_k: int | None = None,
) -> None:
    """Train a small model with the router under each layout and as one process, on gloo ranks of this machine.

    `target` is its import path. Not for routers that draw random numbers in training: ranks draw different ones.

    Raises:
        AssertionError: losses or gradients differ by more than 1e-5 relative, or counters at all; names the layout.
    """
    moe = replace(
        BASE.model.moe,
        router=ComponentConfig(target=target, options=options or {}),
        balance=balance or replace(BASE.model.moe.balance, bias_update_rate=0.0),
        top_k=top_k or BASE.model.moe.top_k,
    )
    model, train = replace(BASE.model, moe=moe), replace(BASE.train, steps=steps)
    config = replace(BASE, model=model, train=train)
    reference = parity(config, 1, MICRO_STEPS)[0]
    for name in layouts:
        world_size, degrees = LAYOUTS[name]
        spread = replace(config, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
        difference = compare(parity(spread, world_size, MICRO_STEPS), reference)
        assert difference.worst < MAX_ERROR, f"{target} under {name}: {difference}"
