"""Variables that libraries under us read, and would answer for late, with a traceback or not at all. Pure."""

import re
from collections.abc import Mapping, Sequence

from moesys.parallel.interfaces import chosen_interfaces

_THREADS = re.compile(r"[1-9][0-9]*( *, *[1-9][0-9]*)*")
"""A number, or one for each level of nesting."""


def environment_problems(
    environ: Mapping[str, str], interfaces: Sequence[str], *, with_nccl: bool
) -> list[str]:
    """What is wrong with the variables of any process that trains, by variable, value, rule and fix.

    Args:
        interfaces: the names of those that this machine has.
        with_nccl: whether this process's ranks talk through NCCL; else its variables are nobody's.
    """
    found = []
    threads = environ.get("OMP_NUM_THREADS")
    if threads is not None and not _THREADS.fullmatch(threads.strip()):
        found.append(
            f"OMP_NUM_THREADS={threads} must be a whole number, at least 1: unset it, and moesys train shares "
            "out the cores, or export the threads of one rank"
        )
    for variable in ("GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if with_nccl else [])):
        chosen = environ.get(variable)
        if chosen is not None and not chosen_interfaces(variable, chosen, interfaces):
            found.append(
                f"{variable}={chosen} must name an interface of this machine, and they are "
                f"{', '.join(interfaces)}: unset it, or set it to one of those"
            )
    return found
