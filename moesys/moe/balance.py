"""Losses and biases that keep expert load even. Separate from the router, which only decides.

Shapes: T tokens, E experts, K experts per token, B sequences, S tokens per sequence (T = B * S).

With f_i = share of the slots that went to expert i and P_i = mean routing probability of i,

    balance loss = E * sum_i f_i P_i          (1 when the load is even; Switch eq. 4, GShard)

The level says over which tokens f_i is counted (2501.11873): a rank's micro-batch, each sequence, or all
ranks and the micro-steps of this optimizer step so far. P_i is always local: averaged over ranks it is global.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.schema import BalanceConfig
from moesys.moe.routing import RoutingResult
from moesys.ops import tokens_per_expert


class RoutingLosses(NamedTuple):
    """Scalars, each a mean over this rank's tokens; `total` is what is optimised."""

    total: Tensor
    """Sum of the losses, each with its coefficient."""
    balance: Tensor
    """Balance loss without coefficient, detached."""
    z: Tensor
    """z-loss without coefficient, detached."""

    def __add__(self, other: "RoutingLosses") -> "RoutingLosses":  # type: ignore[override]
        return RoutingLosses(*(a + b for a, b in zip(self, other, strict=True)))


def balance_loss(probs_TE: Tensor, counts_E: Tensor) -> Tensor:
    """E * sum_i f_i P_i with f from `counts_E` (slots per expert, any integer or float type)."""
    fractions_E = counts_E.to(probs_TE.dtype) / counts_E.sum().clamp(min=1)
    return probs_TE.shape[1] * torch.dot(fractions_E, probs_TE.mean(dim=0))


def sequence_balance_loss(probs_TE: Tensor, topk_ids_TK: Tensor, num_sequences: int) -> Tensor:
    """The mean over sequences of each sequence's own balance loss (DeepSeek-V3 eq. 17)."""
    num_experts = probs_TE.shape[1]
    ids_BN = topk_ids_TK.reshape(num_sequences, -1)
    counts_BE = probs_TE.new_zeros(num_sequences, num_experts)
    counts_BE.scatter_add_(1, ids_BN.clamp(min=0), (ids_BN >= 0).to(counts_BE.dtype))
    fractions_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    probs_BE = probs_TE.view(num_sequences, -1, num_experts).mean(dim=1)
    return num_experts * (fractions_BE * probs_BE).sum(dim=1).mean()


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean_t logsumexp(logits_t)^2 (ST-MoE eq. 5)."""
    return logits_TE.logsumexp(dim=-1).square().mean()


def updated_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """bias + rate * sign(mean load - load) (DeepSeek-V3 sec. 2.1.2); `load_E` of the whole global batch."""
    load_E = load_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(load_E.mean() - load_E)


class Balance:
    """The balance rules of one MoE layer, with what they remember within an optimizer step."""

    def __init__(self, config: BalanceConfig) -> None:
        self.config = config
        self.group: dist.ProcessGroup | None = None
        """Ranks over which the global level counts; None = this rank alone."""
        self._step_counts_E: Tensor | None = None

    def losses(self, routing: RoutingResult, num_sequences: int, training: bool) -> RoutingLosses:
        """The losses of one forward. With the global level this is a collective in training."""
        balance = self._balance_loss(routing, num_sequences, training)
        z = z_loss(routing.logits_TE)
        total = self.config.aux_loss_coef * balance + self.config.z_loss_coef * z
        if routing.extra_loss is not None:
            total = total + routing.extra_loss
        return RoutingLosses(total, balance.detach(), z.detach())

    def _balance_loss(self, routing: RoutingResult, num_sequences: int, training: bool) -> Tensor:
        if self.config.aux_loss_level == "sequence":
            return sequence_balance_loss(routing.probs_TE, routing.topk_ids_TK, num_sequences)
        counts_E = tokens_per_expert(routing.topk_ids_TK, routing.probs_TE.shape[1])
        if self.config.aux_loss_level == "global" and training and self.config.aux_loss_coef:
            if self.group is not None:
                dist.all_reduce(counts_E, group=self.group)
            if self._step_counts_E is not None:
                counts_E = counts_E + self._step_counts_E
            self._step_counts_E = counts_E
        return balance_loss(routing.probs_TE, counts_E)

    def end_step(self) -> None:
        """Forget the counts: the optimizer has stepped."""
        self._step_counts_E = None
