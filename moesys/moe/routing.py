"""The contract between a router and the rest of the MoE layer.

Shapes: T tokens on this rank, D model, E experts, K experts per token, M MoE layers, N slots of a blend.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor


class Blend(Protocol):
    """Rows that are mixtures of tokens (SoftMoE, 2308.00951): experts serve N slots in the place of T tokens."""

    def slots(self, x_TD: Tensor) -> Tensor:
        """[N, D]; the ids and weights of the result are theirs. With ranks a collective."""
        ...

    def tokens(self, y_ND: Tensor) -> Tensor:
        """[T, D], what each token gets of all slots. With ranks a collective."""
        ...

    def detached(self) -> "Blend":
        """The same numbers outside of the graph that made them."""
        ...


@dataclass(frozen=True, kw_only=True)
class RoutingResult:
    """What a router decided for T tokens. Decisions are saved under recompute, never made twice."""

    topk_ids_TK: Tensor
    """int64, expert of each slot; -1 = no expert. Experts of one token are distinct; K may be any number."""
    topk_weights_TK: Tensor
    """fp32, the weight of each slot in the combined output; 0 where the id is -1."""
    logits_TE: Tensor
    """fp32, before any score function (what a z-loss reads)."""
    probs_TE: Tensor
    """fp32, scores normalised to sum 1 over E, without selection bias (what a balance loss reads)."""
    extra_loss: Tensor | None = None
    """Scalar mean over tokens of a loss of the router's own, added to the balance losses."""
    state: Tensor | None = None
    """fp32 [T, state_dim], what a recurrent router hands to the next layer's router; the first gets None."""
    blend: Blend | None = None
    """With it, ids and weights are those of N slots ([N, K]) that stand for the tokens."""


def with_rows(routed: RoutingResult, number: int) -> RoutingResult:
    """With rows behind the tokens, so many together, that go to no expert. Logits and probabilities stay the tokens'."""
    missing = number - len(routed.logits_TE)
    if not missing:
        return routed
    state = routed.state
    return replace(
        routed,
        topk_ids_TK=F.pad(routed.topk_ids_TK, (0, 0, 0, missing), value=-1),
        topk_weights_TK=F.pad(routed.topk_weights_TK, (0, 0, 0, missing)),
        state=state if state is None else F.pad(state, (0, 0, 0, missing)),
    )


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """What an optimizer step routed, over all ranks and micro-steps."""

    load_ME: Tensor
    """int64, slots of each expert of every MoE layer; E is the most that one has, the others' rows end in zeros."""
    layer: int
    """Which of the M the router is of."""
    num_tokens: int
    """That each layer routed."""


@runtime_checkable
class FollowsLoad(Protocol):
    """A router that moves with the load of all ranks."""

    def end_step(self, load: StepLoad) -> None:
        """Called on every rank after each optimizer step that changed weights."""
        ...


class Router(Protocol):
    """A torch module with this forward, built as `Router(d_model=, num_experts=, top_k=, **options)`.

    It is also given what it names:

    - `layer` and `num_layers` in its constructor: its place among the MoE layers, from 0, and their number
    - `tokens` in its forward: `moesys.moe.tokens.Tokens`

    and may have

    - `state_dim`: the numbers per token of the state that it hands on; a pipeline's stages are told it
    - `over_depth`: names of its submodules that are one for all layers, the first layer's
    - `needs_whole_sequences`: True = its forward looks at whole sequences, of which all have equal length (`tokens.by_sequence`); of
      the class, so that a configuration which cuts them in pieces is refused
    - `end_step`, as FollowsLoad has it
    - a buffer `selection_bias_E`, which `balance.bias_update_rate` moves
    """

    def __call__(self, x_TD: Tensor, state: Tensor | None = None) -> RoutingResult: ...
