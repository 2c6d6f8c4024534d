"""Runs a program as every rank of a fabric that is made for it, and collects the lines of JSON that rank 0 prints."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.fabric.job import run_job
from benchmarks.fabric.layout import Layout
from benchmarks.fabric.network import fabric

TIMEOUT_S = 1800.0


def told_by_rank_0(
    layout: Layout,
    words: Sequence[str],
    each: Callable[[dict[str, Any]], None],
    environ: Mapping[str, str] | None = None,
) -> None:
    """`each` gets every line as it comes. `environ`: this process's unless given.

    Raises:
        RuntimeError: ranks failed; with what they said last.
    """
    said: list[str] = []

    def say(rank: int, line: str) -> None:
        if rank == 0 and line.startswith("{"):
            each(json.loads(line))
        else:
            said.append(f"[{rank}] {line}")

    with fabric(layout):
        status = run_job(layout, words, timeout_s=TIMEOUT_S, say=say, environ=environ)
    if status:
        raise RuntimeError(f"ranks ended with {status}:\n" + "\n".join(said[-20:]))
