"""Outliers wait until there is one for each micro-batch (WLB-LLM, 2503.17924, multi-level queues). Pure.

A sequence much longer than the rest makes the micro-batch that it is in the longest, whatever else is moved, and all others wait
for it. So sequences from a length on wait, each level of lengths on its own, until a batch has one for each of its micro-batches.
What goes is planned by any policy; `sorted` is the one of the paper.

The queue is a value. Its sequences are known by ids that outlive a batch, such as their places in the order that is read. A
loader stores with its position the queue behind the batch that was trained last; one that plans ahead keeps each batch's with it.

Shapes: S sequences.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from moesys.plan.placement import Integers

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class OutlierDelay:
    """Which sequences wait, and for what."""

    least_tokens: tuple[int, ...]
    """Of each level, ascending; shorter sequences wait for nothing. One waits that alone is more work than a mean micro-batch."""
    num_micro_batches: int
    """Of a batch, on all ranks: as many of a level go at a time, or a multiple."""
    most_batches: int
    """That one goes after at the latest; then all of its level do, since the first of them costs the time of all."""


class Waiting(NamedTuple):
    """A sequence that has not gone."""

    id: int
    length: int
    batches: int
    """That went without it."""


class Going(NamedTuple):
    """Sequences of a batch, as they arrived; those of a plan for these lengths are places here."""

    ids_S: Integers
    lengths_S: Integers


@dataclass(frozen=True)
class Delayed:
    """The queue behind a batch."""

    waiting: tuple[Waiting, ...] = ()
    """As they arrived."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"version": VERSION, "waiting": [[*sequence] for sequence in self.waiting]}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Self:
        """The same.

        Raises:
            ValueError: it is of another version.
        """
        if told.get("version") != VERSION:
            raise ValueError(
                f"a queue of sequences of version {told.get('version')!r}, where {VERSION} is read: continue with the release "
                "that wrote it, or begin an epoch anew"
            )
        return cls(tuple(Waiting(*sequence) for sequence in told["waiting"]))


def delayed(
    queue: Delayed, ids_S: Integers, lengths_S: Integers, delay: OutlierDelay, *, is_last: bool
) -> tuple[Going, Delayed]:
    """What goes of those that wait and those that arrive, and the queue behind it; with the last batch of an epoch all go."""
    arrived = zip(ids_S.tolist(), lengths_S.tolist(), strict=True)
    sequences = [*queue.waiting, *(Waiting(name, length, 0) for name, length in arrived)]
    levels: list[list[int]] = [[] for _ in range(len(delay.least_tokens) + 1)]
    for place, sequence in enumerate(sequences):
        levels[bisect_right(delay.least_tokens, sequence.length)].append(place)
    goes = np.zeros(len(sequences), dtype=np.bool_)
    goes[levels[0]] = True
    for level in levels[1:]:
        is_due = bool(level) and sequences[level[0]].batches >= delay.most_batches
        full = len(level) - len(level) % delay.num_micro_batches
        goes[level if is_due or is_last else level[:full]] = True
    going = [sequences[place] for place in np.flatnonzero(goes)]
    staying = [sequences[place] for place in np.flatnonzero(~goes)]
    return (
        Going(
            np.array([sequence.id for sequence in going], dtype=np.int64),
            np.array([sequence.length for sequence in going], dtype=np.int64),
        ),
        Delayed(tuple(Waiting(name, length, batches + 1) for name, length, batches in staying)),
    )
