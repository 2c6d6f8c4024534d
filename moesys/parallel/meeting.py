"""All ranks meet in the job's store, before any backend: who is there, who is missing, who differs.

torchrun restarts ranks beside a store that still holds what dead ones wrote. So rank 0 takes the next
generation from a counter, and tells it to each rank that asks; a dead rank's question is answered too, and
nobody reads that. Everything after lies under the generation's own prefix.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from moesys.parallel.roll_call import Expected, Facts, Verdict, judge

GRACE_S = 10.0
"""Rank 0's verdict comes after the other ranks' own time is over."""
_POLL_S = 0.02
LONGEST_POLL_S = 0.5
"""Thousands of ranks ask one store."""
_FAREWELL_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What came of it."""

    verdict: Verdict
    generation: int
    store: dist.PrefixStore
    """Of this generation alone."""


def meet(store: dist.Store, mine: Facts, settings: str, expected: Expected) -> Meeting:
    """Collective: all ranks of the job, within `expected.within_s`. `settings` must be the same on all.

    Raises:
        ValueError: a rank is missing, came twice or differs; rank 0 lists everything, the others its first.
    """
    try:
        if mine.rank == 0:
            return _preside(store, mine, settings, expected)
        return _attend(store, mine, settings, expected)
    except dist.DistError as error:
        raise ValueError(
            f"rank {mine.rank} on {mine.node}: the job's store closed while ranks met "
            f"({type(error).__name__}): rank 0, or torchrun on its node, has ended; its output says why"
        ) from error


def _preside(store: dist.Store, mine: Facts, settings: str, expected: Expected) -> Meeting:
    deadline = time.monotonic() + expected.within_s
    generation = store.add("generation", 1)
    own = dist.PrefixStore(f"generation {generation}", store)
    own.set("settings", settings)
    own.set("world_size", str(expected.world_size))
    answered, others = store.add("answered", 0), expected.world_size - 1
    while own.add("arrived", 0) < others and not own.add("complaints", 0):
        if time.monotonic() > deadline:
            break
        for number in range(answered + 1, store.add("asked", 0) + 1):
            store.set(f"answer {number}", f"{generation} {time.time()}")
            answered = store.add("answered", 1)
        time.sleep(_POLL_S)
    present = {0: mine}
    for rank in range(1, expected.world_size):
        if own.check([f"facts {rank}"]):
            present[rank] = Facts(**json.loads(own.get(f"facts {rank}")))
    complaints = [
        own.get(f"complaint {n}").decode() for n in range(1, own.add("complaints", 0) + 1)
    ]
    verdict = judge(present, expected, complaints)
    own.set("verdict", json.dumps(asdict(verdict)))
    if verdict.problems:
        _wait_for_readers(own, len(present) - 1 + len(complaints))
        raise ValueError(_refusal(verdict.problems))
    return Meeting(verdict=verdict, generation=generation, store=own)


def _wait_for_readers(own: dist.Store, readers: int) -> None:
    """The store ends with this process."""
    deadline = time.monotonic() + _FAREWELL_S
    while own.add("read", 0) < readers and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _attend(store: dist.Store, mine: Facts, settings: str, expected: Expected) -> Meeting:
    deadline = time.monotonic() + expected.within_s
    number = store.add("asked", 1)
    answer = _await(store, f"answer {number}", deadline)
    now_s = time.time()
    if answer is None:
        raise ValueError(
            f"rank {mine.rank} on {mine.node}: rank 0 did not come within "
            f"train.start_timeout_s={expected.within_s:g}: read its output; if it needs longer, raise "
            "train.start_timeout_s"
        )
    generation, their_s = answer.split()
    own = dist.PrefixStore(f"generation {generation}", store)
    if complaint := _complaint(own, mine, expected):
        own.set(f"complaint {own.add('complaint numbers', 1)}", complaint)
        own.add("complaints", 1)
    else:
        problems = [mine.problem, _unlike(own.get("settings").decode(), settings)]
        facts = replace(
            mine,
            problem="; ".join(p for p in problems if p),
            clock_ahead_s=now_s - float(their_s),
        )
        own.set(f"facts {mine.rank}", json.dumps(asdict(facts)))
        own.add("arrived", 1)
    said = _await(own, "verdict", deadline + GRACE_S)
    if said is None:
        raise ValueError(
            f"rank {mine.rank} on {mine.node}: rank 0 was there, but gave no sign for "
            f"{expected.within_s + GRACE_S:g} s: read its output"
        )
    own.add("read", 1)
    verdict = Verdict(**json.loads(said))
    if verdict.problems:
        raise ValueError(_refusal(verdict.problems[:1], len(verdict.problems) - 1))
    return Meeting(verdict=verdict, generation=int(generation), store=own)


def _complaint(own: dist.Store, mine: Facts, expected: Expected) -> str:
    """Why this process is no rank of rank 0's job; "" if it is."""
    theirs = int(own.get("world_size"))
    if theirs != expected.world_size:
        return (
            f"rank {mine.rank} on {mine.node} was started as one of {expected.world_size} ranks, rank 0 as "
            f"one of {theirs}: give all the same WORLD_SIZE, and each job its own MASTER_PORT"
        )
    if own.add(f"claims {mine.rank}", 1) > 1:
        return (
            f"rank {mine.rank} came twice, also from {mine.node}: give every process its own RANK, and each "
            "job its own MASTER_PORT"
        )
    return ""


def _unlike(theirs: str, ours: str) -> str:
    """The lines in which two configurations differ."""
    if theirs == ours:
        return ""
    lines = [f"  rank 0: {line}" for line in _only_in(theirs, ours)]
    lines += [f"  here:   {line}" for line in _only_in(ours, theirs)]
    listed = "\n".join(lines)
    return (
        "composed another configuration than rank 0: start every rank with the same overrides, files and "
        f"environment\n{listed}"
    )


def _only_in(text: str, other: str) -> list[str]:
    known = set(other.splitlines())
    return [line for line in text.splitlines() if line not in known]


def _refusal(problems: Sequence[str], more: int = 0) -> str:
    rest = f"\n  (and {more} more, in rank 0's output)" if more else ""
    return "the ranks cannot start together\n" + "\n".join(f"  {p}" for p in problems) + rest


def _await(store: dist.Store, key: str, deadline: float) -> str | None:
    """Asks again and again, since a wait inside the store hears no signal; the longer it takes, the rarer."""
    began = time.monotonic()
    while (now := time.monotonic()) < deadline:
        if store.check([key]):
            return store.get(key).decode()
        time.sleep(min(LONGEST_POLL_S, max(_POLL_S, (now - began) / 10)))
    return None
