"""Balance losses by their formulas, and what they remember within a step.

Shapes: T tokens, E experts, K experts per token, B sequences.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moesys.config.schema import BalanceConfig
from moesys.moe.balance import (
    Balance,
    SequenceShare,
    balance_loss,
    updated_bias,
    z_loss,
)
from moesys.moe.routing import RoutingResult
from moesys.ops import tokens_per_expert
from moesys.testing.ranks import run_ranks

T, E, K = 12, 4, 2


def routing(seed: int, tokens: int = T) -> RoutingResult:
    logits_TE = torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed))
    probs_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(K)
    return RoutingResult(
        topk_ids_TK=ids_TK, topk_weights_TK=weights_TK, logits_TE=logits_TE, probs_TE=probs_TE
    )


def losses(balance: Balance, r: RoutingResult, seq_len: int, training: bool):
    return balance.losses(r, tokens_per_expert(r.topk_ids_TK, E), seq_len, training)


def spelled_out(ids_TK, probs_TE) -> float:
    """E * sum_i f_i P_i, with two Python sums."""
    tokens = len(ids_TK)
    loss = 0.0
    for expert in range(E):
        f = sum(row.count(expert) for row in ids_TK.tolist()) / (tokens * K)
        loss += f * sum(p[expert] for p in probs_TE.tolist()) / tokens
    return E * loss


def test_even_load_gives_one_and_one_expert_gives_its_share():
    probs = torch.full((8, E), 1 / E)
    assert balance_loss(probs, torch.tensor([4, 4, 4, 4])).item() == pytest.approx(1.0)
    certain = torch.zeros(8, E)
    certain[:, 0] = 1.0
    assert balance_loss(certain, torch.tensor([16, 0, 0, 0])).item() == pytest.approx(E)


def test_micro_level_is_the_formula():
    r = routing(0)
    level = losses(Balance(BalanceConfig(aux_loss_coef=0.5, aux_loss_level="micro")), r, 1, True)
    assert level.balance.item() == pytest.approx(spelled_out(r.topk_ids_TK, r.probs_TE))
    assert level.total.item() == pytest.approx(0.5 * level.balance.item())


def sequence_level(r: RoutingResult, ids_TK: torch.Tensor, seq_len: int) -> float:
    config = BalanceConfig(aux_loss_coef=1.0, aux_loss_level="sequence")
    return losses(Balance(config), replace(r, topk_ids_TK=ids_TK), seq_len, True).total.item()


def _shared(rank: int, size: int) -> float:
    balance = Balance(BalanceConfig(aux_loss_coef=1.0, aux_loss_level="sequence"))
    balance.sequence_share = SequenceShare(group=dist.group.WORLD, tp_rank=rank, tp_size=size)
    own = slice(rank * 6, rank * 6 + 6)
    r = routing(1)
    part = replace(r, topk_ids_TK=r.topk_ids_TK[own], probs_TE=r.probs_TE[own])
    return losses(balance, part, 4, True).total.item()


def test_ranks_that_share_sequences_have_the_mean_of_whole_ones():
    """Three sequences of 4 tokens over 2 ranks: the second is cut in the middle."""
    r = routing(1)
    whole = sequence_level(r, r.topk_ids_TK, 4)
    assert sum(run_ranks(_shared, 2)) / 2 == pytest.approx(whole)


def test_sequence_level_is_the_mean_of_each_sequences_formula():
    r = routing(1)
    expected = sum(
        spelled_out(r.topk_ids_TK[s], r.probs_TE[s])
        for s in (slice(0, 4), slice(4, 8), slice(8, 12))
    )
    assert sequence_level(r, r.topk_ids_TK, 4) == pytest.approx(expected / 3)


def test_sequence_level_does_not_count_slots_without_an_expert():
    r = routing(1, tokens=4)
    ids = r.topk_ids_TK.clone()
    ids[:, 1] = -1
    counts = torch.bincount(ids[:, 0], minlength=E)
    expected = balance_loss(r.probs_TE, counts).item()
    assert sequence_level(r, ids, 4) == pytest.approx(expected)


def test_z_loss_and_its_gradient():
    logits = torch.randn(5, E, dtype=torch.float64, requires_grad=True)
    expected = (logits.exp().sum(-1).log() ** 2).mean()
    assert z_loss(logits).item() == pytest.approx(expected.item())
    assert torch.autograd.gradcheck(z_loss, (logits,))


def test_bias_rises_for_the_idle_and_falls_for_the_busy():
    bias = updated_bias(torch.zeros(4), torch.tensor([10, 6, 6, 2]), 0.001)
    assert bias.tolist() == pytest.approx([-0.001, 0.0, 0.0, 0.001])


def _global(rank: int, size: int, micro_steps: int):
    balance = Balance(BalanceConfig(aux_loss_coef=1.0, aux_loss_level="global"))
    balance.group = dist.group.WORLD
    return [
        losses(balance, routing(10 * m + rank), 1, True).balance.item() for m in range(micro_steps)
    ]


def test_global_level_counts_all_ranks_and_the_micro_steps_so_far():
    size, micro_steps = 2, 3
    per_rank = run_ranks(_global, size, micro_steps)
    counts = torch.zeros(E, dtype=torch.int64)
    for m in range(micro_steps):
        results = [routing(10 * m + rank) for rank in range(size)]
        counts += sum(torch.bincount(r.topk_ids_TK.flatten(), minlength=E) for r in results)
        for rank, result in enumerate(results):
            expected = balance_loss(result.probs_TE, counts).item()
            assert per_rank[rank][m] == pytest.approx(expected)


def test_the_mean_of_the_ranks_global_losses_is_the_loss_of_all_tokens():
    of_ranks = [rank_losses[0] for rank_losses in run_ranks(_global, 2, 1)]
    both = [routing(0), routing(1)]
    ids, probs = (torch.cat([getattr(r, k) for r in both]) for k in ("topk_ids_TK", "probs_TE"))
    assert sum(of_ranks) / 2 == pytest.approx(spelled_out(ids, probs))


def test_counts_are_forgotten_after_the_step_and_never_made_in_evaluation():
    balance = Balance(BalanceConfig(aux_loss_coef=1.0, aux_loss_level="global"))
    first = losses(balance, routing(0), 1, True).balance
    losses(balance, routing(1), 1, False)
    assert losses(balance, routing(0), 1, True).balance == first  # counts of the same batch twice
    losses(balance, routing(2), 1, True)
    balance.end_step()
    assert losses(balance, routing(0), 1, True).balance == first
