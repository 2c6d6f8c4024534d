"""The MoE layer: decide (route, count, plan), dispatch, experts, combine.

Shapes: T tokens on this rank, U tokens of its tensor-parallel group, D model, K experts per token, R rows received,
L local experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from moesys.config.schema import MoEConfig
from moesys.moe.balance import Balance, RoutingLosses
from moesys.moe.capacity import capacity_rows, within_capacity
from moesys.moe.component import build_router, takes
from moesys.moe.compression import UNCOMPRESSED, Compression
from moesys.moe.decision import Decision, DecisionMemory
from moesys.moe.dispatch import Dispatcher, LocalDispatcher
from moesys.moe.experts import ExpertClasses, Experts, SwiGLU
from moesys.moe.held_experts import HeldExperts
from moesys.moe.latent import Latent
from moesys.moe.layer_placement import LayerPlacement
from moesys.moe.load import ExpertLoad
from moesys.moe.null_experts import NullExperts
from moesys.moe.routing import RoutingResult, with_rows
from moesys.moe.shared import SharedGate
from moesys.moe.tokens import WHOLE_SEQUENCES, Known, Tokens
from moesys.ops import tokens_per_expert
from moesys.ops.autocast import compute_type


class MoELayer(nn.Module):
    """Replaces a feed-forward by num_experts of them, top_k per token, plus shared experts that all tokens see.

    It is the `layer`-th of `num_layers`. Built for one rank; `parallelize` swaps the dispatcher and shards the experts.
    """

    def __init__(
        self, config: MoEConfig, d_model: int, layer: int = 0, num_layers: int = 1
    ) -> None:
        super().__init__()
        self.config = config
        self.router = build_router(config, d_model, layer, num_layers)
        if config.balance.bias_update_rate and not hasattr(self.router, "selection_bias_E"):
            raise ValueError(
                f"model.moe.balance.bias_update_rate={config.balance.bias_update_rate} needs a router with a "
                f"buffer selection_bias_E, which {config.router.target} has not: set the rate to 0"
            )
        d_row = config.d_latent or d_model
        self.latent = Latent(d_model, d_row) if config.d_latent else None
        num_classes = len(config.widths)
        self.experts: Experts | ExpertClasses | HeldExperts = (
            Experts(config.num_experts, d_row, config.d_expert)
            if num_classes == 1
            else ExpertClasses(config.num_experts, d_row, config.widths)
        )
        self.shared = (
            SwiGLU(d_model, config.num_shared_experts * config.d_expert)
            if config.num_shared_experts
            else None
        )
        gate = config.shared_gate
        self.shared_gate = None if gate == "none" else SharedGate(d_model, gate)
        has_null = config.num_choices > config.num_experts
        self.null_experts = NullExperts(config, d_model) if has_null else None
        self.dispatcher: Dispatcher = LocalDispatcher(config.num_experts, num_classes)
        self.placement: LayerPlacement | None = None
        """Of experts that may have copies on other ranks."""
        self.d_model, self.layer = d_model, layer
        self.compression = UNCOMPRESSED
        self.candidates: dict[str, Compression] = {}
        """By name, what `compression` may become."""
        self.compresses = True
        """Whether it does, in training."""
        self.coded_rows = 0
        """That the codec has made, in training, since this was set to 0."""
        self.share = WHOLE_SEQUENCES
        """Of this rank's sequences."""
        self.balance = Balance(config.balance, config.top_k, config.width_of_choice)
        self.load = ExpertLoad(config.num_choices)
        self.memory = DecisionMemory()
        self._passes_tokens = takes(self.router.forward, "tokens")
        self.runs_again = False
        """Whether a forward is a second one, to be compared, of which nothing is counted."""

    @property
    def may_compress(self) -> bool:
        """Whether its output is another in training."""
        return self.compression.changes

    @contextmanager
    def compressing(self, compression: Compression | None = None) -> Iterator[None]:
        """Within, an evaluation's forward is done again, compressed: as in training, or so."""
        before = self.compression
        self.compression, self.runs_again = compression or before, True
        try:
            yield
        finally:
            self.compression, self.runs_again = before, False

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        seq_len: int | None = None,
        known: Known | None = None,
    ) -> tuple[Tensor, RoutingLosses, Tensor | None]:
        """Return y like x, the routing losses (means over this rank's tokens), and the router's state.

        x is [B, S, D], or [T, D] with `seq_len` tokens of this rank's sequences next to each other, or pieces of some. `known` of
        them is for losses of sequences, and routers that ask.
        """
        x_TD = x.flatten(0, -2)
        tokens = self._tokens(x_TD.shape[0], seq_len or x.shape[-2], known)
        decision = self.memory.recall(lambda x_TD: self._decide(x_TD, state, tokens), x_TD)
        routed_TD, x_TD = x_TD, compute_type(x_TD)
        sent_TD = x_TD if self.latent is None else self.latent.enter(x_TD)
        if decision.blend is not None:
            sent_TD = decision.blend.slots(sent_TD)
        code = decision.code
        coded = sent_TD if code is None else code.encode(sent_TD)
        rows_RD, tokens_per_expert_L = self.dispatcher.dispatch(coded, decision.plan)
        rows_RD = self.experts(rows_RD, tokens_per_expert_L, *decision.plan.expert_arguments)
        if code is None:
            y_TD = self.dispatcher.combine(rows_RD, decision.weights_TK, decision.plan)
        else:
            ones_C1 = decision.weights_TK.new_ones(coded.shape[0], 1)
            out_CD = self.dispatcher.combine(rows_RD, ones_C1, decision.plan)
            y_TD = code.decode(out_CD, coded, sent_TD, decision.weights_TK)
        if decision.blend is not None:
            y_TD = decision.blend.tokens(y_TD)
        if self.latent is not None:
            y_TD = self.latent.leave(y_TD)
        if self.null_experts is not None and decision.null_ids_TK is not None:
            weights_TK = decision.weights_TK
            y_TD = y_TD + self.null_experts(x_TD, decision.null_ids_TK, weights_TK)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            gate = self.shared_gate
            y_TD = y_TD + shared_TD if gate is None else gate(routed_TD, y_TD, shared_TD)
        return y_TD.view_as(x), decision.losses, decision.state

    def _tokens(self, num_rows: int, seq_len: int, known: Known | None) -> Tokens:
        known, share = known or Known(), self.share
        num_tokens = known.own_tokens(share, num_rows)
        ids_T, places_T = (x if x is None else share.own_run(x, num_tokens) for x in known[:2])
        return Tokens(
            num_tokens=num_tokens,
            seq_len=seq_len if known.pieces is None else None,
            ids_T=ids_T,
            places_T=places_T,
            share=share,
            pieces=known.pieces,
        )

    def _decide(self, x_TD: Tensor, state: Tensor | None, tokens: Tokens) -> Decision:
        """Route, limit, plan, and count once what was routed: for the losses, the load and the bias."""
        routed = self._route(x_TD, state, tokens)
        limited, padded_rows = self._limit(routed, tokens)
        kept = with_rows(limited, x_TD.shape[0])
        has_null = self.null_experts is not None
        sent_ids_TK = self._with_rows(kept.topk_ids_TK) if has_null else kept.topk_ids_TK
        code = None
        compresses = self.runs_again or (self.training and self.compresses)
        compression = self.compression if compresses else UNCOMPRESSED
        if compression.codec is not None:
            assert routed.blend is None, "moe/contract.py refuses blends with a codec"
            seen_TD = x_TD.detach()
            if not compression.is_checked:
                seen_TD = seen_TD.nan_to_num(0, 0, 0)
            code = compression.codec.plan(seen_TD, sent_ids_TK, self.config.num_experts)
            self.coded_rows += code.ids_C1.shape[0] * self.training
        rows_ids = sent_ids_TK if code is None else code.ids_C1
        plan = self.dispatcher.plan(rows_ids, padded_rows, compression.formats)
        if has_null or code is not None:
            kept_E = tokens_per_expert(kept.topk_ids_TK, self.config.num_choices)
        else:
            kept_E = plan.slots_per_expert_E
        routed_E = kept_E
        if limited is not routed:
            routed_E = tokens_per_expert(routed.topk_ids_TK, self.config.num_choices)
        losses = self.balance.losses(routed, routed_E, tokens, self.training)
        if self.training:
            self.load.add(routed_E, kept_E, routed.probs_TE)
        return Decision(
            weights_TK=kept.topk_weights_TK,
            plan=plan,
            losses=losses,
            state=kept.state,
            blend=routed.blend,
            code=code,
            null_ids_TK=kept.topk_ids_TK if has_null else None,
        )

    def _route(self, x_TD: Tensor, state: Tensor | None, tokens: Tokens) -> RoutingResult:
        """What the router decides for the tokens, which are the first of the rows."""
        known = {"tokens": tokens} if self._passes_tokens else {}
        if tokens.num_tokens < x_TD.shape[0]:
            x_TD = x_TD[: tokens.num_tokens]
            state = state if state is None else state[: tokens.num_tokens]
        return self.router(x_TD, state, **known)

    def _with_rows(self, ids_TK: Tensor) -> Tensor:
        """-1 in the place of experts that have no feed-forward."""
        return ids_TK.masked_fill(ids_TK >= self.config.num_experts, -1)

    def _limit(self, routed: RoutingResult, tokens: Tokens) -> tuple[RoutingResult, int | None]:
        """Apply the expert capacity, if any; return the routing and the rows per expert if padded.

        Evaluation is dropless: what a model is worth does not depend on how its text was batched.
        """
        config = self.config
        if config.capacity_factor is None or not self.training:
            return routed, None
        # All ranks pad to the capacity of the one with the most tokens.
        own, most = (
            capacity_rows(number, config.top_k, config.num_experts, config.capacity_factor)
            for number in (tokens.num_tokens, tokens.most_tokens)
        )
        kept = within_capacity(routed, config.num_experts, own, config.capacity_priority)
        return kept, most if config.capacity_policy == "pad" else None
