"""Losses and biases that keep expert load even. Separate from the router, which only decides.

Shapes: T tokens, E experts, K experts per token, B sequences.

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


def sequence_counts(topk_ids_TK: Tensor, sequence_T: Tensor, counts_BE: Tensor) -> Tensor:
    """Add each token's slots to its sequence's row of `counts_BE`, in place."""
    kept_TK = (topk_ids_TK >= 0).to(counts_BE.dtype)
    at_TK = sequence_T[:, None] * counts_BE.shape[1] + topk_ids_TK.clamp(min=0)
    counts_BE.view(-1).scatter_add_(0, at_TK.flatten(), kept_TK.flatten())
    return counts_BE


def sequence_balance_loss(probs_TE: Tensor, sequence_T: Tensor, counts_BE: Tensor) -> Tensor:
    """The mean over sequences of each sequence's own balance loss (DeepSeek-V3 eq. 17).

    `sequence_T` says whose each token is, `counts_BE` are the slots of whole sequences. As P_i is a mean over tokens,
    that mean is E * mean_t sum_i f_i(sequence of t) p_i(t), so ranks may share a sequence out.
    """
    fractions_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    return probs_TE.shape[1] * (fractions_BE[sequence_T] * probs_TE).sum(dim=1).mean()


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean_t logsumexp(logits_t)^2 (ST-MoE eq. 5)."""
    return logits_TE.logsumexp(dim=-1).square().mean()


def updated_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """bias + rate * sign(mean load - load) (DeepSeek-V3 sec. 2.1.2); `load_E` of the whole global batch."""
    load_E = load_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(load_E.mean() - load_E)


class SequenceShare(NamedTuple):
    """Which of the tokens of its ranks' common sequences this rank has."""

    group: dist.ProcessGroup | None = None
    """The ranks that share sequences; None = this rank alone has whole ones."""
    tp_rank: int = 0
    """This rank has the tp_rank-th of tp_size equal runs of tokens."""
    tp_size: int = 1


class Balance:
    """The balance rules of one MoE layer, with what they remember within an optimizer step."""

    def __init__(self, config: BalanceConfig) -> None:
        self.config = config
        self.group: dist.ProcessGroup | None = None
        """Ranks over which the global level counts; None = this rank alone."""
        self.sequence_share = SequenceShare()
        self._step_counts_E: Tensor | None = None

    def losses(
        self, routing: RoutingResult, counts_E: Tensor, seq_len: int, training: bool
    ) -> RoutingLosses:
        """The losses of one forward, `counts_E` being its slots per expert; without a coefficient, figures only.

        With the global and the sequence level this is a collective in training. `seq_len` tokens in a row of the ranks
        that share the same stretches of sequences are one sequence's.
        """
        config = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.aux_loss_coef != 0):
            balance = self._balance_loss(routing, counts_E, seq_len, training)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.z_loss_coef != 0):
            z = z_loss(routing.logits_TE)
        total = config.aux_loss_coef * balance + config.z_loss_coef * z
        if routing.extra_loss is not None:
            total = total + routing.extra_loss
        return RoutingLosses(total, balance.detach(), z.detach())

    def _balance_loss(
        self, routing: RoutingResult, counts_E: Tensor, seq_len: int, training: bool
    ) -> Tensor:
        if self.config.aux_loss_level == "sequence":
            return self._sequence_loss(routing, seq_len)
        if self.config.aux_loss_level == "micro" and self.sequence_share.group is not None:
            counts_E = _summed(counts_E, self.sequence_share.group)
        if self.config.aux_loss_level == "global" and training and self.config.aux_loss_coef:
            if self.group is not None:
                counts_E = _summed(counts_E, self.group)
            if self._step_counts_E is not None:
                counts_E = counts_E + self._step_counts_E
            self._step_counts_E = counts_E
        return balance_loss(routing.probs_TE, counts_E)

    def _sequence_loss(self, routing: RoutingResult, seq_len: int) -> Tensor:
        share, num_tokens = self.sequence_share, routing.probs_TE.shape[0]
        first = share.tp_rank * num_tokens
        tokens_T = torch.arange(first, first + num_tokens, device=routing.probs_TE.device)
        sequence_T = tokens_T // seq_len
        num_sequences = num_tokens * share.tp_size // seq_len
        counts_BE = routing.probs_TE.new_zeros(num_sequences, routing.probs_TE.shape[1])
        sequence_counts(routing.topk_ids_TK, sequence_T, counts_BE)
        if share.group is not None:
            dist.all_reduce(counts_BE, group=share.group)
        return sequence_balance_loss(routing.probs_TE, sequence_T, counts_BE)

    def end_step(self) -> None:
        """Forget the counts: the optimizer has stepped."""
        self._step_counts_E = None


def _summed(counts_E: Tensor, group: dist.ProcessGroup) -> Tensor:
    summed_E = counts_E.clone()
    dist.all_reduce(summed_E, group=group)
    return summed_E
