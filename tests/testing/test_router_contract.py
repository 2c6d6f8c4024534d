"""The contract passes our routers and catches each way of breaking it."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moesys.moe.contract import ContractError
from moesys.moe.routers import TopKRouter
from moesys.moe.tokens import Tokens
from moesys.testing import router_contract
from tests.train.recurrent_router import RecurrentRouter


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize_weights", [True, False])
def test_top_k_holds_to_the_contract(score_function, normalize_weights):
    router_contract.check(
        lambda **sizes: TopKRouter(
            **sizes, score_function=score_function, normalize_weights=normalize_weights
        )
    )


def test_a_router_with_a_state_is_called_with_one():
    """Its matrix for the state gets a gradient from that call alone."""
    router_contract.check(RecurrentRouter)


class Halved(RecurrentRouter):
    def forward(self, x_TD, state=None):
        result = super().forward(x_TD, state)
        assert result.state is not None
        return replace(result, state=result.state.bfloat16())


class Stateless(TopKRouter):
    state_dim = 4


@pytest.mark.parametrize(
    ("router", "rule"), [(Halved, "must be fp32"), (Stateless, "gives no state")]
)
def test_a_state_is_what_the_class_says(router, rule):
    with pytest.raises(ContractError, match=rule):
        router_contract.check(router)


class Asking(TopKRouter):
    """Asks something of its tokens, as the class says."""

    ask: Callable[[Tokens], object]

    def forward(self, x_TD, state=None, tokens=None):
        assert tokens is not None
        type(self).ask(tokens)
        return super().forward(x_TD, state)


def test_a_router_of_whole_sequences_says_so():
    """Its class: one whose sequences may be of any length need not."""
    for ask, why in (
        (lambda tokens: tokens.by_sequence(torch.device("cpu")), "whole sequences are asked for"),
        (lambda tokens: tokens.gathered(torch.zeros(tokens.num_tokens)), "are asked for"),
        (lambda tokens: tokens.num_tokens // tokens.seq_len, "TypeError"),
    ):
        asking = type("Asking", (Asking,), {"ask": staticmethod(ask)})
        with pytest.raises(ContractError, match=f"needs_whole_sequences must be True.*{why}"):
            router_contract.check(asking)
        router_contract.check(type("Whole", (asking,), {"needs_whole_sequences": True}))
    whose: list[list[int]] = []
    per_token = type(
        "PerToken",
        (Asking,),
        {"ask": lambda tokens: whose.append(tokens.sequence_T(torch.device("cpu")).tolist())},
    )
    router_contract.check(per_token)
    assert [0] * 5 + [1] * 11 in whose
    assert [0] * 16 in whose


class Broken(TopKRouter):
    """A router that spoils its result in one way."""

    def __init__(self, spoil, **sizes) -> None:
        super().__init__(**sizes)
        self.spoil = spoil

    def forward(self, x_TD, state=None):
        return self.spoil(super().forward(x_TD, state))


SPOILS = {
    "must be distinct": lambda r: replace(
        r, topk_ids_TK=r.topk_ids_TK[:, :1].expand_as(r.topk_ids_TK)
    ),
    "must be torch.int64": lambda r: replace(r, topk_ids_TK=r.topk_ids_TK.int()),
    "must be torch.float32": lambda r: replace(r, topk_weights_TK=r.topk_weights_TK.bfloat16()),
    "must sum to 1": lambda r: replace(r, probs_TE=r.probs_TE * 2),
    "must lie in -1..3": lambda r: replace(r, topk_ids_TK=r.topk_ids_TK + 5),
    "0 where the id is -1": lambda r: replace(r, topk_ids_TK=r.topk_ids_TK.clamp(max=-1)),
    "must be finite": lambda r: replace(r, logits_TE=r.logits_TE * float("inf")),
    "no gradient": lambda r: replace(
        r,
        topk_weights_TK=r.topk_weights_TK.detach() + 0 * r.topk_weights_TK,
        probs_TE=r.probs_TE.detach(),
        logits_TE=r.logits_TE.detach() + 0 * r.logits_TE,
    ),
    "must be [T, state_dim]": lambda r: replace(r, state=torch.zeros(3, 2)),
    "a finite scalar": lambda r: replace(r, extra_loss=torch.zeros(2)),
    "same input": lambda r: replace(
        r, topk_ids_TK=(r.topk_ids_TK + next(_counter)) % r.logits_TE.shape[1]
    ),
    "under autocast": lambda r: replace(
        r, topk_weights_TK=r.topk_weights_TK * (0.5 if torch.is_autocast_enabled("cpu") else 1.0)
    ),
    "not detached": lambda r: replace(r, topk_weights_TK=r.topk_weights_TK.detach()),
    "RoutingResult": lambda r: r.topk_ids_TK,
}
_counter = iter(range(1000))


@pytest.mark.parametrize("rule", SPOILS)
def test_a_broken_rule_is_named(rule):
    with pytest.raises(ContractError, match=re.escape(rule)):
        router_contract.check(lambda **sizes: Broken(SPOILS[rule], **sizes))
