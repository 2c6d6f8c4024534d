"""What a command costs, whatever else the machine does. Time spent waiting is left to a timeout."""

import resource


def children_s() -> float:
    """Processor seconds of all processes that this one has started and seen end, with theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
