"""torchrun's agent or slurmstepd, the process that starts the ranks of one machine, and what happens to them when it is gone.

A rank that outlives it holds its GPU, its ports and the run folder, and nobody starts it again.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
"""prctl(2)."""


class Agent:
    """Of this process. Make it while the agent lives."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = os.getppid()

    @property
    def is_gone(self) -> bool:
        """Whether this process has got another parent."""
        return os.getppid() != self.pid

    def at_its_end(self, number: signal.Signals) -> None:
        """Main thread: let the kernel send `number` to this process as soon as the agent is gone (Linux only)."""
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if self.is_gone:  # before the kernel was asked
            os.kill(os.getpid(), number)


def find_agent(environ: Mapping[str, str]) -> Agent | None:
    """This rank's agent, torchrun or slurmstepd; None if neither started it, or something is in between."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return Agent("torchrun")
    with suppress(OSError):
        # Of what stands between, as a container's starter, it is not known what its end means.
        if Path(f"/proc/{os.getppid()}/comm").read_text().strip() == "slurmstepd":
            return Agent("slurmstepd")
    return None
