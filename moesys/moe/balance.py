"""Losses and biases that keep expert load even. Separate from the router, which only decides.

Shapes: T tokens, E experts, K experts per token, B sequences, G groups of experts.

With f_i = share of the slots that went to expert i and P_i = mean routing probability of i,

    balance loss = E * sum_i f_i P_i          (1 when the load is even; Switch eq. 4, GShard)

There is one for each level, over whose tokens f_i is counted (2501.11873): a rank's micro-batch, each sequence, or all
ranks and the micro-steps of this optimizer step so far. P_i is always local: averaged over ranks it is global.
The device loss is the same of groups of experts, counted as the global one (DeepSeekMoE, 2401.06066, eq. 15-17), the
width loss of experts of different widths, each weighed by its own (the parameter penalty of HMoE, 2408.10681).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.schema import BalanceConfig
from moesys.moe.routing import RoutingResult
from moesys.moe.tokens import Tokens
from moesys.ops import tokens_per_expert


class RoutingLosses(NamedTuple):
    """Scalars, each a mean over this rank's tokens; `total` is what is optimised."""

    total: Tensor
    """Sum of the losses, each with its coefficient."""
    balance: Tensor
    """The loss of the widest level that is optimised, without coefficient, detached; 0 where none is."""
    z: Tensor
    """z-loss without coefficient, detached."""

    def __add__(self, other: "RoutingLosses") -> "RoutingLosses":  # type: ignore[override]
        return RoutingLosses(*(a + b for a, b in zip(self, other, strict=True)))


def mean_of_tokens(x: Tensor) -> Tensor:
    """Over the first dim; 0 of none, which a rank may have in a micro-step."""
    return x.sum(dim=0) / max(1, len(x))


def balance_loss(probs_TE: Tensor, counts_E: Tensor) -> Tensor:
    """E * sum_i f_i P_i with f from `counts_E` (slots per expert, any integer or float type)."""
    fractions_E = counts_E.to(probs_TE.dtype) / counts_E.sum().clamp(min=1)
    return probs_TE.shape[1] * torch.dot(fractions_E, mean_of_tokens(probs_TE))


def device_balance_loss(probs_TE: Tensor, counts_E: Tensor, num_groups: int) -> Tensor:
    """sum_d f_d P_d: of each of G groups of experts the mean f, in units of an even load, times the sum of P."""
    counts_G = counts_E.view(num_groups, -1).sum(1)
    return balance_loss(probs_TE.unflatten(1, (num_groups, -1)).sum(2), counts_G)


def width_loss(probs_TE: Tensor, counts_E: Tensor, widths_E: Tensor) -> Tensor:
    """E * sum_i f_i P_i h_i with h_i an expert's width over the mean: least where narrow experts serve."""
    return balance_loss(probs_TE * (widths_E / widths_E.mean()), counts_E)


def sequence_counts(topk_ids_TK: Tensor, sequence_T: Tensor, counts_BE: Tensor) -> Tensor:
    """Add each token's slots to its sequence's row of `counts_BE`, in place."""
    kept_TK = (topk_ids_TK >= 0).to(counts_BE.dtype)
    at_TK = sequence_T[:, None] * counts_BE.shape[1] + topk_ids_TK.clamp(min=0)
    counts_BE.view(-1).scatter_add_(0, at_TK.flatten(), kept_TK.flatten())
    return counts_BE


def sequence_balance_loss(probs_TE: Tensor, sequence_T: Tensor, counts_BE: Tensor) -> Tensor:
    """The mean over sequences, weighed by their tokens, of each sequence's own balance loss (DeepSeek-V3 eq. 17).

    `sequence_T` says whose each token is, `counts_BE` are the slots of whole sequences. As P_i is a mean over tokens,
    that mean is E * mean_t sum_i f_i(sequence of t) p_i(t), so ranks may share a sequence out.
    """
    fractions_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    return probs_TE.shape[1] * mean_of_tokens((fractions_BE[sequence_T] * probs_TE).sum(dim=1))


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean_t logsumexp(logits_t)^2 (ST-MoE eq. 5)."""
    return mean_of_tokens(logits_TE.logsumexp(dim=-1).square())


def updated_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """bias + rate * sign(mean load - load) (DeepSeek-V3 sec. 2.1.2); `load_E` of the whole global batch."""
    load_E = load_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(load_E.mean() - load_E)


class Balance:
    """The balance rules of one MoE layer, with what they remember within an optimizer step."""

    def __init__(
        self, config: BalanceConfig, top_k: int, width_of_choice: Sequence[int] = ()
    ) -> None:
        self.config = config
        self.top_k = top_k
        self.widths_E = torch.tensor(width_of_choice, dtype=torch.float32, device="cpu")
        """What the width loss reads."""
        self.group: dist.ProcessGroup | None = None
        """Ranks over which the global level counts; None = this rank alone."""
        self._step_counts_E: Tensor | None = None

    def losses(
        self, routing: RoutingResult, counts_E: Tensor, tokens: Tokens, training: bool
    ) -> RoutingLosses:
        """The losses of one forward, `counts_E` being its slots per expert. z is a figure also without a coefficient.

        Where a selection bias decides too, f_i counts what the scores alone would choose (DeepSeek-V3 eq. 18): the bias
        evens out the load, the losses the scores. With a loss that counts over ranks a collective; the global one in training.
        """
        config = self.config
        ids_TK = routing.topk_ids_TK
        if config.bias_update_rate and config.has_loss:
            ids_TK = routing.probs_TE.detach().topk(self.top_k, dim=-1)[1]
            counts_E = tokens_per_expert(ids_TK, routing.probs_TE.shape[1])
        found = list(self._balance_losses(routing.probs_TE, ids_TK, counts_E, tokens, training))
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.z_loss_coef != 0):
            z = z_loss(routing.logits_TE)
        total = config.z_loss_coef * z
        for coefficient, loss in found:
            total = total + coefficient * loss
        if routing.extra_loss is not None:
            total = total + routing.extra_loss
        balance = found[-1][1] if found else torch.zeros_like(z)
        return RoutingLosses(total, balance.detach(), z.detach())

    def _balance_losses(
        self,
        probs_TE: Tensor,
        ids_TK: Tensor,
        counts_E: Tensor,
        tokens: Tokens,
        training: bool,
    ) -> Iterator[tuple[float, Tensor]]:
        """(coefficient, loss) of those that are on, from the one that counts over fewest tokens to the widest."""
        config = self.config
        if config.sequence_loss_coef:
            yield config.sequence_loss_coef, _sequence_loss(probs_TE, ids_TK, tokens)
        if config.micro_loss_coef:
            group = tokens.share.group
            shared_E = counts_E if group is None else _summed(counts_E, group)
            yield config.micro_loss_coef, balance_loss(probs_TE, shared_E)
        if config.global_loss_coef or config.device_loss_coef or config.width_loss_coef:
            step_E = self._count_step(counts_E) if training else counts_E
            if config.width_loss_coef:
                self.widths_E = self.widths_E.to(probs_TE.device)
                yield config.width_loss_coef, width_loss(probs_TE, step_E, self.widths_E)
            if config.device_loss_coef:
                loss = device_balance_loss(probs_TE, step_E, config.device_groups)
                yield config.device_loss_coef, loss
            if config.global_loss_coef:
                yield config.global_loss_coef, balance_loss(probs_TE, step_E)

    def _count_step(self, counts_E: Tensor) -> Tensor:
        """Of all ranks, and of the step so far."""
        if self.group is not None:
            counts_E = _summed(counts_E, self.group)
        if self._step_counts_E is not None:
            counts_E = counts_E + self._step_counts_E
        self._step_counts_E = counts_E
        return counts_E

    def end_step(self) -> None:
        """Forget the counts: the optimizer has stepped."""
        self._step_counts_E = None


def _sequence_loss(probs_TE: Tensor, ids_TK: Tensor, tokens: Tokens) -> Tensor:
    sequence_T = tokens.sequence_T(probs_TE.device)
    counts_BE = probs_TE.new_zeros(tokens.num_sequences, probs_TE.shape[1])
    counts_BE = tokens.summed_by_sequence(sequence_counts(ids_TK, sequence_T, counts_BE))
    return sequence_balance_loss(probs_TE, sequence_T, counts_BE)


def _summed(counts_E: Tensor, group: dist.ProcessGroup) -> Tensor:
    summed_E = counts_E.clone()
    dist.all_reduce(summed_E, group=group)
    return summed_E
