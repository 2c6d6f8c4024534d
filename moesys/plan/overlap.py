"""How many experts may be copied for free: before a layer's experts need them. Pure."""

import statistics
from collections.abc import Sequence

from moesys.plan.links import Links

AHEAD_STEPS = 5
"""So many are looked at: the first compiles and connects."""


def overlap_degree(
    ahead_s: Sequence[float], links: Links, copy_bytes: float, num_experts: int
) -> int:
    """Hecate's t = T_nonMoE bandwidth / expert bytes (2502.02581): as many as come to every node within `ahead_s`, by the link
    that is shared by most. At least 1, at most `num_experts`.

    Args:
        ahead_s: of steps, from where copies may set out to where they are needed; their median counts.
        links: of which one is there.
        copy_bytes: of an expert's parameters as they travel.
    """
    link = links.between or links.inside
    assert link is not None, "there are other ranks"
    in_time_s = max(0.0, statistics.median(ahead_s) - link.latency_s)
    return max(1, min(num_experts, int(in_time_s * link.bytes_per_s / copy_bytes)))
