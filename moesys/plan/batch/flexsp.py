"""FlexSP (2412.01523): in each micro-step ranks form groups of different sizes, by a mixed-integer program. Pure.

Sequences in order of length are cut into micro-batches of about as many tokens, so that those of one are of like
lengths. For each a program chooses groups of a power of two ranks, or of all, and what each gets, such that the slowest ends as
early as can be (`group_program`); sequences stand in it in buckets of like lengths.

Shapes: S sequences, N of them in a micro-batch, the longest first, G sizes of groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.fit import check_fits
from moesys.plan.batch.group_program import Bucket, group_counts
from moesys.plan.batch.length_runs import length_buckets, token_runs
from moesys.plan.batch.plan import BatchPlan, Piece, batch_plan
from moesys.plan.placement import Amounts, Integers

MOST_BUCKETS = 16
NUMBERS_TRIED = 5
TIMES_TRIED = (1.0, 1.01, 1.02, 1.03, 1.05, 1.07, 1.1, 1.13, 1.17, 1.22, 1.3, 1.4, 1.6, 2.0, 3.0)
"""So many times the least that a micro-step could take."""


def flexsp(
    lengths_S: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts
) -> BatchPlan:
    """The best of five numbers of micro-batches, from the fewest that have memory for all tokens.

    Raises:
        ValueError: a sequence does not fit, or scipy is not installed.
    """
    check_fits(lengths_S.tolist(), num_ranks, capacity_tokens)
    whole = _whole(lengths_S, num_ranks, capacity_tokens, costs)
    least = max(1, math.ceil(lengths_S.sum() / (num_ranks * capacity_tokens)))
    best: list[list[Piece]] | None = None
    best_s = math.inf
    number = least
    while best is None or number < least + NUMBERS_TRIED:
        cuts = number >= 2 * least + NUMBERS_TRIED
        found = _micro_steps(whole, number, costs.micro_step_s, best_s, cuts=cuts)
        best_s, best = found or (best_s, best)
        number += 1 if number < least + NUMBERS_TRIED else max(1, number // 16)
    return batch_plan(lengths_S, num_ranks, best)


def group_sizes(num_ranks: int) -> list[int]:
    """The powers of two, and all ranks."""
    return [1 << power for power in range((num_ranks - 1).bit_length())] + [num_ranks]


def _micro_steps(
    whole: "_MicroBatch", number: int, micro_step_s: float, most_s: float, *, cuts: bool
) -> tuple[float, list[list[Piece]]] | None:
    """How long they take, and their pieces; None if `most_s` or longer, or if a micro-batch has no groups, which with `cuts` is
    cut in two instead."""
    lengths_N = whole.tokens_NG[:, 0]
    to_do = token_runs(lengths_N, number)[::-1]
    steps: list[list[Piece]] = []
    total_s = 0.0
    while to_do:
        run = to_do.pop()
        rest_s = whole.part(slice(run.stop, None)).even_s + len(to_do) * micro_step_s
        found = whole.part(run).grouped(most_s - total_s - micro_step_s - rest_s)
        if found is not None:
            total_s += micro_step_s + found[0]
            steps.append(found[1])
        elif cuts and run.stop - run.start > 1:
            halves = token_runs(lengths_N[run], 2)[::-1]
            to_do += [slice(run.start + half.start, run.start + half.stop) for half in halves]
        else:
            assert not cuts, "a sequence alone has a group"
            return None
    return total_s, steps


def _whole(
    lengths_S: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts
) -> "_MicroBatch":
    """All sequences that are not empty.

    Raises:
        ValueError: no group has memory for a sequence: of an odd number of tokens a rank may not be filled to the last.
    """
    order_S = np.argsort(-lengths_S, kind="stable")
    sequences_N = order_S[lengths_S[order_S] > 0]
    lengths_N1 = lengths_S[sequences_N][:, None]
    sizes_G = np.array(group_sizes(num_ranks))
    # Two slices of a ring, as long as any (plan.zigzag).
    tokens_NG = np.where(sizes_G == 1, lengths_N1, 2 * -(-lengths_N1 // (2 * sizes_G)))
    homeless_N = np.flatnonzero((tokens_NG > capacity_tokens).all(1))
    if len(homeless_N):
        sequence = int(sequences_N[homeless_N[0]])
        raise ValueError(
            f"sequence {sequence} has {int(lengths_S[sequence])} tokens, too many for {num_ranks} ranks with memory for "
            f"{capacity_tokens}, of which rings use an even number: cut it, skip it, or give ranks more memory"
        )
    return _MicroBatch(
        num_ranks=num_ranks,
        capacity_tokens=capacity_tokens,
        sizes_G=sizes_G,
        sequences_N=sequences_N,
        work_N=costs.work_s(lengths_S[sequences_N]),
        seconds_NG=costs.rank_s(lengths_N1, sizes_G),
        tokens_NG=tokens_NG,
    )


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """Sequences, and what they would be for groups of each size."""

    num_ranks: int
    capacity_tokens: int
    sizes_G: Integers
    sequences_N: Integers
    work_N: Amounts
    """Seconds of all ranks."""
    seconds_NG: Amounts
    tokens_NG: Integers
    """On the rank with the most, or more."""

    def part(self, run: slice) -> "_MicroBatch":
        """Some of them."""
        return replace(
            self,
            sequences_N=self.sequences_N[run],
            work_N=self.work_N[run],
            seconds_NG=self.seconds_NG[run],
            tokens_NG=self.tokens_NG[run],
        )

    def grouped(self, most_s: float) -> tuple[float, list[Piece]] | None:
        """How long the slowest group takes, and who gets what; None if nothing under `most_s` is found."""
        lengths_N = self.tokens_NG[:, 0]
        runs = length_buckets(lengths_N, MOST_BUCKETS)
        buckets = [
            Bucket(
                sequences=run.stop - run.start,
                seconds_G=self.seconds_NG[run].mean(0),
                tokens_G=self.tokens_NG[run].max(0),
            )
            for run in runs
        ]
        budget = self.sizes_G, self.num_ranks, self.capacity_tokens
        if group_counts(buckets, *budget, math.inf) is None:
            return None
        least_s = self._least_s()
        best = None
        for times in TIMES_TRIED:
            if times * least_s >= most_s:
                break
            counts = group_counts(buckets, *budget, times * least_s)
            if counts is None:
                continue
            found = self._packed(_of_sizes(runs, counts.sequences_BG), counts.groups_G)
            if found is not None and found[0] < most_s:
                most_s, _ = best = found
        return best

    @property
    def even_s(self) -> float:
        """If all ranks could share all work."""
        return float(self.work_N.sum()) / self.num_ranks

    def _least_s(self) -> float:
        """No micro-step takes less."""
        fitting_NG = np.where(self.tokens_NG <= self.capacity_tokens, self.seconds_NG, np.inf)
        return max(self.even_s, float(fitting_NG.min(1).max()))

    def _packed(
        self, of_size: Sequence[Sequence[int]], groups_G: Integers
    ) -> tuple[float, list[Piece]] | None:
        """The longest first, each to the group of its size that has the least and memory for it; None if there is none. Large
        groups have the first ranks."""
        pieces: list[Piece] = []
        slowest_s, first = 0.0, 0
        for g in reversed(range(len(self.sizes_G))):
            size, groups = int(self.sizes_G[g]), int(groups_G[g])
            busy_s, room = np.zeros(groups), np.full(groups, self.capacity_tokens)
            for n in of_size[g]:
                fitting_s = np.where(room >= self.tokens_NG[n, g], busy_s, np.inf)
                if not np.isfinite(fitting_s).any():
                    return None
                group = int(fitting_s.argmin())
                busy_s[group] += self.seconds_NG[n, g]
                room[group] -= self.tokens_NG[n, g]
                start = first + group * size
                pieces.append(Piece(int(self.sequences_N[n]), tuple(range(start, start + size))))
            slowest_s = max(slowest_s, float(busy_s.max(initial=0.0)))
            first += groups * size
        return slowest_s, pieces


def _of_sizes(runs: Sequence[slice], sequences_BG: Integers) -> list[list[int]]:
    """Which go to groups of each size: of a bucket the longest to the largest."""
    of_size: list[list[int]] = [[] for _ in sequences_BG[0]]
    for run, sequences_G in zip(runs, sequences_BG, strict=True):
        sizes = np.repeat(np.arange(len(sequences_G)), sequences_G)[::-1]
        for n, size in zip(range(run.start, run.stop), sizes.tolist(), strict=True):
            of_size[size].append(n)
    return of_size
