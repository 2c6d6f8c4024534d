"""How long each part of a start takes, from the submission of the job to the training loop."""

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

SUBMITTED_VARIABLE = "MOESYS_SUBMITTED_UNIX_S"
"""When the job was submitted, in seconds since 1970; set by who submits, for the wait in the queue."""
_RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


class StartUp:
    """A clock that is asked at the end of each part; a process makes one as early as it can."""

    def __init__(
        self,
        created_unix_s: float,
        submitted_unix_s: float | None = None,
        *,
        is_restart: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`is_restart`: the submission is of an earlier start, and what lies between is no queue."""
        self.created_unix_s, self.submitted_unix_s = created_unix_s, submitted_unix_s
        self._clock = clock
        self._marked_unix_s = created_unix_s
        self._parts_s: dict[str, float] = {}
        if submitted_unix_s is not None and not is_restart:
            self._parts_s["queue"] = max(0.0, created_unix_s - submitted_unix_s)

    def mark(self, part: str) -> None:
        """What was done since the last mark, or the process's first moment, was `part`."""
        now = self._clock()
        took_s = max(0.0, now - self._marked_unix_s)
        self._parts_s[part] = self._parts_s.get(part, 0.0) + took_s
        self._marked_unix_s = now

    def fields(self) -> dict[str, Any]:
        """For the start record: created_unix_s, submitted_unix_s where it is told, start_up_s by part."""
        told = {"created_unix_s": self.created_unix_s, "submitted_unix_s": self.submitted_unix_s}
        return {
            **{name: unix_s for name, unix_s in told.items() if unix_s is not None},
            "start_up_s": dict(self._parts_s),
        }


def begin_start_up(environ: Mapping[str, str]) -> StartUp:
    """This process's: until now it loaded its code.

    Raises:
        ValueError: MOESYS_SUBMITTED_UNIX_S is no time.
    """
    is_restart = any(environ.get(name, "0") != "0" for name in _RESTARTS)
    start_up = StartUp(created_unix_s(), submitted_unix_s(environ), is_restart=is_restart)
    start_up.mark("import")
    return start_up


def created_unix_s() -> float:
    """When this process was made, to a hundredth of a second; psutil knows that of Linux to a second only."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return psutil.Process(os.getpid()).create_time()
    return time.time() - age_s


def submitted_unix_s(environ: Mapping[str, str]) -> float | None:
    """When the job was submitted; None where nobody told.

    Raises:
        ValueError: the variable is no time.
    """
    text = environ.get(SUBMITTED_VARIABLE)
    if not text:
        return None
    try:
        unix_s = float(text)
    except ValueError:
        unix_s = math.nan
    if not (math.isfinite(unix_s) and unix_s >= 0):
        raise ValueError(
            f"{SUBMITTED_VARIABLE}={text}: must be seconds since 1970, as `date +%s` prints; unset it to "
            "do without the time in the queue"
        )
    return unix_s
