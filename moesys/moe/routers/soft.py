"""Soft mixtures of tokens in the place of a choice.

Shapes: T tokens on this rank, U tokens of all ranks that share sequences, B sequences of S tokens, D model, E experts,
n = E * p slots of a sequence, N = B * n slots.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.moe.routing import RoutingResult
from moesys.moe.tokens import BySequence, Tokens


class SoftRouter(nn.Module):
    """Each of an expert's p slots is a mean of the sequence's tokens, each token's output a mean of all slots'.

        logits = normalize(x) @ (scale * normalize(phi))      [S, n]
        slots = softmax over tokens (logits)^T x,   y = softmax over slots (logits) expert(slots)

    Source: Soft MoE (2308.00951, sec. 2.1 and 2.3). With `slots_per_expert` S * K / E the experts do the work of K per
    token. A token sees the whole sequence, later tokens too: made for encoders; with a decoder's loss it looks
    ahead. Memory grows with S * n per sequence. Nothing is dropped, and load is even.
    """

    needs_whole_sequences = True

    def __init__(
        self, *, d_model: int, num_experts: int, top_k: int, slots_per_expert: int = 1
    ) -> None:
        super().__init__()
        if slots_per_expert < 1:
            raise ValueError(
                f"router option slots_per_expert={slots_per_expert} must be at least 1"
            )
        self.num_experts = num_experts
        self.slots_per_expert = slots_per_expert
        self.phi = nn.Parameter(torch.empty(num_experts * slots_per_expert, d_model))
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(
        self, x_TD: Tensor, state: Tensor | None = None, tokens: Tokens | None = None
    ) -> RoutingResult:
        """Ids and weights are those of slots: ranks that share sequences make all of them, and each serves some."""
        assert tokens is not None, "the layer passes tokens"
        with torch.autocast(x_TD.device.type, enabled=False):
            phi = F.normalize(self.phi.float(), dim=-1) * self.log_scale.float().exp()
            logits_Tn = F.linear(F.normalize(x_TD.float(), dim=-1), phi)
            by_sequence = tokens.by_sequence(x_TD.device)
            logits_BSn = by_sequence.split(tokens.gathered(logits_Tn))
        by_expert = (self.num_experts, self.slots_per_expert)
        experts_N = torch.arange(self.num_experts, device=x_TD.device)
        experts_N = experts_N.repeat_interleave(self.slots_per_expert).repeat(tokens.num_sequences)
        slots_N = torch.arange(len(experts_N), device=x_TD.device)
        is_own_N = slots_N % tokens.share.size == tokens.share.rank
        return RoutingResult(
            topk_ids_TK=torch.where(is_own_N, experts_N, -1)[:, None],
            topk_weights_TK=is_own_N.float()[:, None],
            logits_TE=logits_Tn.unflatten(1, by_expert).logsumexp(dim=-1),
            probs_TE=logits_Tn.softmax(dim=-1).unflatten(1, by_expert).sum(dim=-1),
            blend=SoftBlend(
                dispatch_BSn=logits_BSn.softmax(dim=1),
                combine_BSn=logits_BSn.softmax(dim=2),
                of=tokens,
                by_sequence=by_sequence,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class SoftBlend:
    """What tokens give to slots and get from them."""

    dispatch_BSn: Tensor
    """fp32, sums to 1 over the tokens of a sequence."""
    combine_BSn: Tensor
    """fp32, sums to 1 over its slots."""
    of: Tokens
    by_sequence: BySequence

    def slots(self, x_TD: Tensor) -> Tensor:
        x_BSD = self.by_sequence.split(self.of.gathered(x_TD))
        return torch.bmm(self.dispatch_BSn.to(x_TD.dtype).mT, x_BSD).flatten(0, 1)

    def tokens(self, y_ND: Tensor) -> Tensor:
        y_BnD = self.of.summed(y_ND).unflatten(0, (self.of.num_sequences, -1))
        y_BSD = torch.bmm(self.combine_BSn.to(y_ND.dtype), y_BnD)
        return self.of.own(self.by_sequence.join(y_BSD))

    def detached(self) -> "SoftBlend":
        dispatch_BSn, combine_BSn = (
            weight.detach().requires_grad_(weight.requires_grad)
            for weight in (self.dispatch_BSn, self.combine_BSn)
        )
        return replace(self, dispatch_BSn=dispatch_BSn, combine_BSn=combine_BSn)
