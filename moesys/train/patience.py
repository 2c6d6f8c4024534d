"""How long a collective may make no progress before the job is given up. No clock in here.

A fixed time is too long after a step of a second and too short for a step of ten minutes. What is waited for is
the slowest rank's next collective, and that is at most one step away: so the steps before say how long is too long.
"""

from collections.abc import Mapping, Sequence

SHORTEST_S = 20.0
"""A machine may pause a process for seconds: swapping, a busy disk, a clock set."""
LONGEST_S = 600.0
"""Also where nothing was measured: the first steps, a first evaluation, what the disk does."""
FACTOR = 10.0
"""Times the slowest of the last ones."""
REMEMBERED = 100
FEW = 3
"""From so many on they say something."""


def patience_s(seconds: Sequence[float], few: int = FEW) -> float:
    """From how long the same thing took before, newest last."""
    if len(seconds) < few:
        return LONGEST_S
    return min(LONGEST_S, max(SHORTEST_S, FACTOR * max(seconds[-REMEMBERED:])))


def unheard(before: Mapping[int, float], now: Mapping[int, float]) -> list[int]:
    """The ranks that said nothing between two looks at the time of each one's last word, by its own clock."""
    return sorted(rank for rank, said_s in now.items() if before.get(rank) == said_s)
