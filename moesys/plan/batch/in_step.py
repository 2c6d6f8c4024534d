"""Hybrid data parallelism for ranks that meet in every layer, as those of expert parallelism do. Pure.

Every rank runs as many micro-steps, and each takes as long as its slowest rank: the sum over micro-steps of the most work of a
rank is what counts (`seconds.in_step`). So every micro-step has a level of its own that all ranks are filled up to. Long
sequences, of which a token is more work, share the first ones, where levels are high; short ones fill what is left of these, and
then micro-steps of their own.

In a pipeline the longest micro-step counts once more for each stage but one, while it fills and drains: more, shorter ones of
like length take less (ByteScale's PP-balance, 2502.21231, section 5).

Shapes: S sequences.
"""

import math
from collections.abc import Sequence

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.exchange import ENOUGH, Exchange
from moesys.plan.batch.filling import GOOD, MOST_LAID, Fillings
from moesys.plan.batch.plan import BatchPlan, batch_plan
from moesys.plan.batch.row import Row
from moesys.plan.batch.seconds import BatchSeconds
from moesys.plan.batch.ways import Batch
from moesys.plan.placement import Integers

TIMES_TRIED = (1.0, 1.03, 1.1, 1.25, 1.5, 2.0)
"""So many times the fewest micro-steps, also with a part of one, that have memory for all tokens."""
TIMES_TRIED_IN_PIPELINES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
LAID_IN_PIPELINES = 2 * MOST_LAID
MEMORY_TRIED = (0.86, 0.9, 0.94, 0.97, 1.0)
"""Parts of all ranks' memory that a micro-step fills, if each takes the longest sequences there are."""


def hdp_in_step(
    lengths_S: Integers,
    num_ranks: int,
    capacity_tokens: int,
    costs: BatchCosts,
    *,
    stages: int = 1,
) -> BatchPlan:
    """The best of several numbers of micro-steps and levels.

    Args:
        costs: of a rank with all layers, or a part of them.
        stages: of each rank's pipeline.

    Raises:
        ValueError: a sequence that does not fit.
    """
    batch = Batch(lengths_S, num_ranks, capacity_tokens, costs)
    if not batch.by_length:
        return batch_plan(lengths_S, num_ranks, [])
    even_s = math.fsum(batch.areas_s) / num_ranks
    fewest = float(lengths_S.sum()) / (num_ranks * capacity_tokens)
    if stages == 1:
        numbers = sorted({each * fewest for each in TIMES_TRIED} | {float(math.ceil(fewest))})
    else:
        numbers = [each * fewest for each in TIMES_TRIED_IN_PIPELINES]
    tried: list[list[float]] = []
    for memory, most_s in [
        *((memory, math.inf) for memory in MEMORY_TRIED if stages == 1),
        *((1.0, even_s / number) for number in numbers),
    ]:
        levels = natural_levels(batch, memory, most_s)
        if levels not in tried:
            tried.append(levels)

    def seconds(rows: Sequence[Row]) -> float:
        each_s = [row.most_busy_s + costs.micro_step_s for row in rows]
        return sum(each_s) + (stages - 1) * max(each_s)

    least_s = even_s + costs.micro_step_s * math.ceil(fewest)
    fillings = Fillings(
        batch,
        tried,
        seconds,
        good_s=GOOD * least_s,
        most_laid=MOST_LAID if stages == 1 else LAID_IN_PIPELINES,
        waits=False,
    )

    exact = BatchSeconds(lengths_S, num_ranks, costs)

    def exact_s(rows: Sequence[Row]) -> float:
        return exact.in_step([row.pieces for row in rows], stages)

    rows = Exchange(batch, exact_s, waits=False).better(fillings.search(), ENOUGH * least_s)
    return batch_plan(lengths_S, num_ranks, [row.pieces for row in rows])


def natural_levels(batch: Batch, memory: float, most_s: float) -> list[float]:
    """Of micro-steps that each take the longest sequences which are left, until their memory is full or so many seconds are: even
    work, if no sequence takes longer by itself."""
    ends_s = np.cumsum(batch.areas_s)
    ends_tokens = np.cumsum([batch.lengths[sequence] for sequence in batch.by_length])
    levels: list[float] = []
    first, before_s, before_tokens = 0, 0.0, 0
    while first < len(ends_s):
        alone_s = min(
            batch.alone_s[batch.by_length[first]], batch.ways(batch.by_length[first]).least_s
        )
        tokens = before_tokens + memory * batch.num_ranks * batch.capacity_tokens
        seconds = before_s + batch.num_ranks * max(most_s, alone_s)
        after = min(
            int(np.searchsorted(ends_tokens, tokens, side="right")),
            int(np.searchsorted(ends_s, seconds, side="right")),
        )
        first = max(first + 1, after)
        levels.append(max(alone_s, (float(ends_s[first - 1]) - before_s) / batch.num_ranks))
        before_s, before_tokens = float(ends_s[first - 1]), int(ends_tokens[first - 1])
    return levels
