"""The best plan of a batch that there is, by branch and bound: a yardstick for six sequences on four ranks or less. Pure.

It is the best of all plans in which `plan.problems` finds nothing wrong: each sequence as a whole in one micro-step, on any
number of ranks in any order of their ring; any number of micro-steps, and of pieces in each. Best by `seconds.in_step` where
ranks meet in every layer, by `seconds.free` where they do not.

A plan is made of blocks: of what some ranks begin and end together, or all where all meet. A block is made of turns: of what goes
around a ring together. Every plan is made so. Some of what is made so takes less than its parts say, as two turns have the same
ring, or not all ranks of a block meet; that plan is made of other parts too, which say what it takes.

Ranks are alike: what a plan's first parts leave to those that follow is what ranks have, whichever these are.

Shapes: S sequences, L ranks of a ring.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from operator import le
from typing import NamedTuple

import numpy as np

from moesys.plan.batch.cost import BatchCosts
from moesys.plan.batch.fit import check_fits
from moesys.plan.batch.plan import BatchPlan, MicroStep, Piece, batch_plan
from moesys.plan.placement import Integers
from moesys.plan.zigzag import ring_tokens

ROUNDING = 1e-12
"""A plan is better by more than this part, or it is not."""

Sequences = tuple[int, ...]
"""The longest first."""


def optimum(
    lengths_S: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts, *, meets: bool
) -> BatchPlan:
    """Raises ValueError for a sequence that does not fit."""
    check_fits(lengths_S.tolist(), num_ranks, capacity_tokens)
    by_length = np.argsort(-lengths_S, kind="stable")
    sequences = tuple(by_length[lengths_S[by_length] > 0].tolist())
    search = _BlockSearch(lengths_S, num_ranks, capacity_tokens, costs, sequences)
    found = _nested(search, sequences, num_ranks, meets=meets)
    best = found.best[sequences, num_ranks]
    if not meets:
        best = _PlanSearch(found.blocks, sequences, num_ranks).best(best)
    return batch_plan(lengths_S, num_ranks, best.steps)


class _Turn(NamedTuple):
    """Sequences that go around a ring together, or one on one rank."""

    size: int
    seconds: float
    """Of each of its ranks."""
    tokens_L: tuple[int, ...]


class _Block(NamedTuple):
    """Sequences in a micro-step of ranks that begin and end it together."""

    size: int
    seconds: float
    step: MicroStep
    """On the first ranks."""


class _Best(NamedTuple):
    seconds: float
    steps: tuple[MicroStep, ...]


NONE = _Best(math.inf, ())


def _subsets(sequences: Sequences) -> Iterator[Sequences]:
    """All that have some of them, the smallest first."""
    for number in range(1, len(sequences) + 1):
        yield from itertools.combinations(sequences, number)


@cache
def _splits(sequences: Sequences) -> list[tuple[Sequences, Sequences]]:
    """Subsets with the first of them, and what is left."""
    first, *others = sequences
    return [
        ((first, *chosen), tuple(other for other in others if other not in chosen))
        for chosen in itertools.chain([()], _subsets(tuple(others)))
    ]


@cache
def _rings(tokens_L: tuple[int, ...], num_ranks: int) -> list[tuple[int, ...]]:
    """Of orders in which each rank has as many tokens, one."""
    told_apart = {
        tuple(sorted(zip(ring, tokens_L, strict=True))): ring
        for ring in itertools.permutations(range(num_ranks), len(tokens_L))
    }
    return list(told_apart.values())


def _turns(
    lengths: Integers, num_ranks: int, capacity_tokens: int, costs: BatchCosts
) -> Iterator[_Turn]:
    """Of sequences of these lengths, on each number of ranks that have memory; not where they wait as long as one by one."""
    for size in range(1, num_ranks + 1):
        tokens_L = np.sum([ring_tokens(length, size) for length in lengths.tolist()], axis=0)
        behind_s = float(costs.behind_s(lengths, size).sum())
        waited_s = (size - 1) * max(0.0, costs.hop_s + behind_s)
        one_by_one_s = float(costs.waited_s(lengths, size).sum())
        if len(lengths) > 1 and waited_s >= one_by_one_s * (1 - ROUNDING):
            continue
        if tokens_L.max() <= capacity_tokens:
            own_s = float(costs.own_s(lengths, size).sum())
            yield _Turn(size, own_s + waited_s, tuple(tokens_L.tolist()))


class _Bound:
    """What is made of these parts does not take less."""

    def __init__(
        self,
        parts: Mapping[Sequences, Sequence[_Turn | _Block]],
        sequences: Sequences,
        num_ranks: int,
    ) -> None:
        self._area_s: dict[Sequences, float] = {(): 0.0}
        """Of all ranks together."""
        for chosen in _subsets(sequences):
            self._area_s[chosen] = min(
                self._area_s[rest]
                + min((p.size * p.seconds for p in parts[part]), default=math.inf)
                for part, rest in _splits(chosen)
            )
        self._least_s = {each: [math.inf] * num_ranks for each in sequences}
        """Of any part with a sequence, on so many ranks."""
        for chosen, of_chosen in parts.items():
            for each, part in itertools.product(chosen, of_chosen):
                least_s = self._least_s[each]
                least_s[part.size - 1] = min(least_s[part.size - 1], part.seconds)

    def seconds(self, begun: "_Begun") -> float:
        free = [rank.free_s for rank in begun.ranks]
        area_s = sum(free) + self._area_s[begun.to_come]
        ends_s = (min(map(float.__add__, free, self._least_s[each])) for each in begun.to_come)
        return max(area_s / len(free), free[-1], *ends_s)


class _Rank(NamedTuple):
    free_s: float
    """For what is to come."""
    room: int
    """Tokens, in this micro-step; as many as all sequences to come have are enough."""
    rank: int


class _Begun(NamedTuple):
    """A block or a plan of some of the sequences."""

    to_come: Sequences
    ranks: tuple[_Rank, ...]
    """In order of what they have."""
    parts: tuple[tuple[Piece, ...], ...]


def _completed(
    begun: _Begun,
    nexts: Callable[[_Begun], Iterator[_Begun]],
    bound: _Bound,
    below_s: float,
) -> _Begun | None:
    """The best there is; None if it takes `below_s` or more."""
    best: _Begun | None = None
    looked_at: dict[Sequences, list[list[float]]] = {}

    def complete(begun: _Begun) -> None:
        """In every way, the most promising first, but those that cannot be better than the best so far."""
        nonlocal best, below_s
        if not begun.to_come:
            best, below_s = begun, begun.ranks[-1].free_s
            return
        ways = list(nexts(begun))
        for bound_s, index in sorted((bound.seconds(way), at) for at, way in enumerate(ways)):
            if bound_s >= below_s * (1 - ROUNDING):
                break
            if not as_good_was_looked_at(ways[index]):
                complete(ways[index])

    def as_good_was_looked_at(begun: _Begun) -> bool:
        """With as much to come, and no rank that has less time or room."""
        has = [number for rank in begun.ranks for number in (rank.free_s, -rank.room)]
        others = looked_at.setdefault(begun.to_come, [])
        if any(all(map(le, other, has)) for other in others):
            return True
        others.append(has)
        return False

    complete(begun)
    return best


class _BlockSearch:
    """The best block of some sequences on some ranks, over all ways to put them into turns and these on rings."""

    def __init__(
        self,
        lengths_S: Integers,
        num_ranks: int,
        capacity_tokens: int,
        costs: BatchCosts,
        sequences: Sequences,
    ) -> None:
        self._lengths: list[int] = lengths_S.tolist()
        self._capacity, self._start_s = capacity_tokens, costs.micro_step_s
        self._turns = {
            chosen: list(_turns(lengths_S[[*chosen]], num_ranks, capacity_tokens, costs))
            for chosen in _subsets(sequences)
        }
        self._bound = _Bound(self._turns, sequences, num_ranks)

    def best(self, sequences: Sequences, size: int, below_s: float) -> _Block | None:
        """None if it takes `below_s` or more."""
        ranks = tuple(_Rank(self._start_s, self._capacity, rank) for rank in range(size))
        begun = _Begun(sequences, ranks, ())
        found = _completed(begun, self._nexts, self._bound, below_s)
        if found is None:
            return None
        return _Block(size, found.ranks[-1].free_s, tuple(itertools.chain(*found.parts)))

    def _nexts(self, begun: _Begun) -> Iterator[_Begun]:
        """With one turn more, the longest sequence to come in it, on any ranks that have room."""
        for chosen, to_come in _splits(begun.to_come):
            enough = sum(self._lengths[each] for each in to_come)
            for turn in self._turns[chosen]:
                for ring in _rings(turn.tokens_L, len(begun.ranks)):
                    ranks = _after_turn(begun.ranks, turn, ring)
                    if ranks is not None:
                        kept = sorted(rank._replace(room=min(rank.room, enough)) for rank in ranks)
                        on = tuple(begun.ranks[at].rank for at in ring)
                        pieces = tuple(Piece(each, on) for each in chosen)
                        yield _Begun(to_come, tuple(kept), (*begun.parts, pieces))


def _after_turn(ranks: Sequence[_Rank], turn: _Turn, ring: tuple[int, ...]) -> list[_Rank] | None:
    """None where room is short, or where ranks that have the same are taken in another order."""
    after = list(ranks)
    for at, tokens in zip(ring, turn.tokens_L, strict=True):
        free_s, room, rank = ranks[at]
        if room < tokens or (at and at - 1 not in ring and ranks[at - 1][:2] == (free_s, room)):
            return None
        after[at] = _Rank(free_s + turn.seconds, room - tokens, rank)
    return after


class _Nested(NamedTuple):
    best: dict[tuple[Sequences, int], _Best]
    """Of some sequences on so many ranks."""
    blocks: dict[Sequences, list[_Block]]
    """Those that are better than others in their place; the best plan needs no more."""


def _nested(search: _BlockSearch, sequences: Sequences, num_ranks: int, *, meets: bool) -> _Nested:
    """What is best of blocks one after the other and, where not all ranks meet, beside each other."""
    found = _Nested({((), num_ranks): _Best(0.0, ())}, {})
    for chosen in _subsets(sequences):
        found.blocks[chosen] = []
        for size in [num_ranks] if meets else range(1, num_ranks + 1):
            best = min(_of_two(found.best, chosen, size), key=lambda two: two.seconds)
            block = search.best(chosen, size, best.seconds)
            if block is not None:
                found.blocks[chosen].append(block)
                best = _Best(block.seconds, (block.step,))
            found.best[chosen, size] = best
    return found


def _of_two(
    known: Mapping[tuple[Sequences, int], _Best], sequences: Sequences, size: int
) -> Iterator[_Best]:
    """One after the other, or beside each other."""
    yield known.get((sequences, size - 1), NONE)
    for part, rest in _splits(sequences)[:-1]:
        first, then = known[part, size], known[rest, size]
        yield _Best(first.seconds + then.seconds, (*first.steps, *then.steps))
        for own in range(1, size):
            left, right = known.get((part, own), NONE), known.get((rest, size - own), NONE)
            moved = (_on(step, range(own, size)) for step in right.steps)
            yield _Best(max(left.seconds, right.seconds), (*left.steps, *moved))


def _on(step: MicroStep, ranks: Sequence[int]) -> MicroStep:
    """These for the first ones."""
    return tuple(Piece(each, tuple(ranks[at] for at in ring)) for each, ring in step)


class _PlanSearch:
    """The best plan of ranks that meet in rings alone, over all orders of blocks and all ranks for them.

    Blocks come in the order in which they begin. So what a rank has left before the last of them has begun is lost.
    """

    def __init__(
        self, blocks: Mapping[Sequences, Sequence[_Block]], sequences: Sequences, num_ranks: int
    ) -> None:
        self._blocks = blocks
        self._bound = _Bound(blocks, sequences, num_ranks)
        ranks = tuple(_Rank(0.0, 0, rank) for rank in range(num_ranks))
        self._begun = _Begun(sequences, ranks, ())

    def best(self, known: _Best) -> _Best:
        """The one that is known, if none is better."""
        found = _completed(self._begun, self._nexts, self._bound, known.seconds)
        return known if found is None else _Best(found.ranks[-1].free_s, found.parts)

    def _nexts(self, begun: _Begun) -> Iterator[_Begun]:
        """With one block more, once so many ranks are free."""
        for chosen in _subsets(begun.to_come):
            to_come = tuple(each for each in begun.to_come if each not in chosen)
            for block in self._blocks[chosen]:
                for last in range(block.size - 1, len(begun.ranks)):
                    begin_s = begun.ranks[last].free_s
                    if last + 1 < len(begun.ranks) and begun.ranks[last + 1].free_s == begin_s:
                        continue
                    first = last + 1 - block.size
                    ranks = [
                        rank._replace(free_s=max(rank.free_s, begin_s)) for rank in begun.ranks
                    ]
                    for at in range(first, last + 1):
                        ranks[at] = ranks[at]._replace(free_s=begin_s + block.seconds)
                    step = _on(block.step, [rank.rank for rank in ranks[first : last + 1]])
                    yield _Begun(to_come, tuple(sorted(ranks)), (*begun.parts, step))
