"""What a batch plan is judged by. Pure.

Shapes: M micro-steps, R data ranks.
"""

from dataclasses import dataclass

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.plan import BatchPlan
from moesys.plan.batch.seconds import BatchSeconds, rank_seconds
from moesys.plan.placement import Integers


@dataclass(frozen=True, kw_only=True)
class BatchFigures:
    """Of one step. Shares are of the time of all ranks."""

    step_s: float
    over_even: float
    """The step over the time that it would take were the work even and nobody waited."""
    idle_share: float
    """The bubble: in which ranks wait for other ranks."""
    keys_share: float
    """In which they wait for keys of a ring: communication that is not hidden."""
    ring_bytes: float
    """That ranks send each other around rings, in all."""
    peak_tokens: int
    """Of the fullest data rank in its fullest micro-step."""
    held_tokens: int
    """Whose activations the fullest rank holds at once: on the first stage those of as many micro-steps as there are stages."""
    micro_steps: int


def figures(
    plan: BatchPlan, costs: BatchCosts, step_s: float, *, stages: int = 1, block_token_bytes: float
) -> BatchFigures:
    """Of a plan whose step takes so long.

    Args:
        block_token_bytes: of a token, from one rank of a ring to the next, in all layers.
    """
    all_s = plan.num_ranks * stages * step_s
    busy_s = rank_seconds(plan, costs).sum()
    seconds = BatchSeconds(plan.lengths_S, plan.num_ranks, costs)
    keys_s = sum(
        len(piece.ranks) * each_s
        for step in plan.micro_steps
        for piece, (_, each_s) in zip(step, seconds.of_pieces(step), strict=True)
    )
    pieces = [piece for _, piece in plan.pieces()]
    lengths = plan.lengths_S[[piece.sequence for piece in pieces]]
    sizes = np.array([len(piece.ranks) for piece in pieces], dtype=np.int64)
    work_s = costs.work_s(plan.lengths_S).sum()
    tokens_MR = plan.tokens_MR()
    return BatchFigures(
        step_s=step_s,
        over_even=float(all_s / work_s) if work_s else 1.0,
        idle_share=float(1 - busy_s / all_s) if all_s else 0.0,
        keys_share=float(keys_s / all_s) if all_s else 0.0,
        ring_bytes=float(block_token_bytes * ((sizes - 1) * lengths).sum()),
        peak_tokens=int(tokens_MR.max(initial=0)),
        held_tokens=int(_sums(tokens_MR, stages).max(initial=0)),
        micro_steps=len(plan.micro_steps),
    )


def _sums(tokens_MR: Integers, number: int) -> Integers:
    """Of so many micro-steps in a row, from each on."""
    ends_MR = np.cumsum(np.concatenate([np.zeros_like(tokens_MR[:1]), tokens_MR]), axis=0)
    number = min(number, len(tokens_MR))
    return ends_MR[number:] - ends_MR[: len(ends_MR) - number]
