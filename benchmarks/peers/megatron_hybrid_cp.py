"""Megatron-core's own scheduler of hybrid context parallelism, its assignment as a plan of ours.

A sequence goes over a power of two ranks by its length alone, the shortest on one; ranks work through theirs one by one, each a
forward and backward of its own, and all wait at the end of a group of such rounds (hybrid_cp_schedule.py).

Shapes: S sequences.
"""

import warnings
from dataclasses import dataclass
from typing import Any

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.fit import check_fits
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.batch.seconds import rank_seconds
from moesys.plan.placement import Integers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that Transformer Engine and Apex are missing
    from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler


@dataclass(frozen=True)
class MegatronPlan:
    """What each rank does."""

    plan: BatchPlan
    """A micro-step is a round: of each rank its next sequence."""
    rounds_per_group: tuple[int, ...]

    def seconds(self, costs: BatchCosts) -> float:
        """Until the last rank has done its last group, all waiting for each other at the end of each."""
        busy_MR = rank_seconds(self.plan, costs)
        total_s, first = 0.0, 0
        for rounds in self.rounds_per_group:
            total_s += float(busy_MR[first : first + rounds].sum(0).max())
            first += rounds
        return total_s


def megatron_plan(lengths_S: Integers, num_ranks: int, capacity_tokens: int) -> MegatronPlan:
    """By `BalancedCPScheduler`, which asks a process group for its size alone.

    Raises:
        ValueError: a sequence does not fit, or ranks are not a power of two.
    """
    if num_ranks & (num_ranks - 1):
        raise ValueError(
            f"Megatron's hybrid context parallelism is for a power of two ranks, not {num_ranks}"
        )
    check_fits(lengths_S.tolist(), num_ranks, capacity_tokens)
    group: Any = _Ranks(num_ranks)
    # Slices of rings are as long as any (plan.zigzag): of an odd number one has a token too many.
    scheduler = BalancedCPScheduler(capacity_tokens // 2 * 2, group)
    named = [(sequence, length) for sequence, length in enumerate(lengths_S.tolist()) if length]
    _, groups = scheduler.get_groups_and_subsamples(named, None)
    steps: list[list[Piece]] = []
    for of_rank in groups:
        for turn in range(max(map(len, of_rank))):
            ranks: dict[int, list[int]] = {}
            for rank, sequences in enumerate(of_rank):
                if turn < len(sequences):
                    ranks.setdefault(sequences[turn], []).append(rank)
            steps.append([Piece(sequence, tuple(its)) for sequence, its in ranks.items()])
    rounds = tuple(max(map(len, of_rank)) for of_rank in groups)
    return MegatronPlan(batch_plan(lengths_S, num_ranks, steps), rounds)


@dataclass(frozen=True)
class _Ranks:
    """Of a process group what the scheduler asks."""

    number: int

    def size(self) -> int:
        return self.number
