"""The planners by name. Pure.

Shapes: S sequences.
"""

from functools import partial

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.flexsp import flexsp
from moesys.plan.batch.hdp import hdp
from moesys.plan.batch.in_step import hdp_in_step
from moesys.plan.batch.naive import naive
from moesys.plan.batch.partition import karmarkar_karp, sorted_greedy
from moesys.plan.batch.plan import BatchPlan
from moesys.plan.batch.seconds import plan_seconds
from moesys.plan.batch.static import balanced, context_size, context_sizes, packed
from moesys.plan.batch.timeline import timeline
from moesys.plan.placement import Integers

POLICIES = ("naive", "static", "sorted", "karmarkar_karp", "flexsp", "hdp")

LEVEL = 1.02
"""A plan that takes no longer than so many times even work is not compared with others."""
FEW = 1 << 18
"""Nor are plans of more sequences times ranks."""


def batch_seconds(plan: BatchPlan, costs: BatchCosts, *, meets: bool, stages: int = 1) -> float:
    """Until the last rank has done its last micro-step."""
    if stages > 1:
        return timeline(plan, costs, stages=stages, meets=meets, ranks=()).step_s
    return plan_seconds(plan, costs, meets=meets)


def planned(
    policy: str,
    lengths_S: Integers,
    num_ranks: int,
    capacity_tokens: int,
    costs: BatchCosts,
    *,
    meets: bool,
    stages: int = 1,
    longest_tokens: int = 0,
) -> BatchPlan:
    """By the planner of that name.

    Args:
        capacity_tokens: for which a rank has memory in a micro-step.
        meets: ranks do in every layer, for experts.
        stages: of each rank's pipeline, which only `hdp` looks at.
        longest_tokens: of a sequence of any batch, which a static mesh has memory for; at least that of this one.

    Raises:
        ValueError: a sequence that all ranks together have no memory for; FlexSP without scipy.
    """
    budget = lengths_S, num_ranks, capacity_tokens
    if policy == "naive":
        return naive(*budget)
    if policy in ("static", "sorted", "karmarkar_karp"):
        size = context_size(np.append(lengths_S, longest_tokens), num_ranks, capacity_tokens)
        if policy == "static":
            return packed(*budget, size)
        partition = sorted_greedy if policy == "sorted" else karmarkar_karp
        return balanced(*budget, size, costs, partition)
    if policy == "flexsp":
        return flexsp(*budget, costs)
    assert policy == "hdp", policy
    return _levelled(*budget, costs, meets, stages)


def _levelled(
    lengths_S: Integers,
    num_ranks: int,
    capacity_tokens: int,
    costs: BatchCosts,
    meets: bool,
    stages: int,
) -> BatchPlan:
    """Hybrid data parallelism's, or a simpler one where that leaves gaps and a simpler one does not.

    In rings alone those are between long rings of any size, which level micro-steps, or rings of one size, lay side by side.
    """
    budget = lengths_S, num_ranks, capacity_tokens
    in_step = partial(hdp_in_step, *budget, costs, stages=stages)
    in_rings = partial(hdp, *budget, costs)
    # Micro-steps of a pipeline go through it in order: they had better be level wherever ranks meet.
    first, second = (in_step, in_rings) if meets or stages > 1 else (in_rings, in_step)
    plans = [naive(*budget), first()]
    seconds = partial(batch_seconds, costs=costs, meets=meets, stages=stages)
    even_s = float(costs.work_s(lengths_S).sum()) / (num_ranks * stages)
    if min(map(seconds, plans)) > LEVEL * even_s and len(lengths_S) * num_ranks <= FEW:
        if stages > 1:
            plans.append(hdp_in_step(*budget, costs))
        if not meets:
            plans.append(second())
        sizes = context_sizes(*budget)
        plans += [packed(*budget, size) for size in sorted({*sizes[:1], *sizes[-1:]})]
        plans += [balanced(*budget, size, costs, karmarkar_karp) for size in sizes[:1]]
    return min(plans, key=seconds)
