"""Items in a number of sets whose sums are about equal. Pure.

Shapes: S items.
"""

import heapq
from bisect import insort

import numpy as np

from moesys.plan.placement import Amounts

_Set = tuple[float, int, object]
"""The sum, negative, a number of its own, and the items: one, or two of these."""
_State = list[_Set]
"""Sets of different items, the largest sums first; as many empty ones as are missing."""


def sorted_greedy(amounts_S: Amounts, number: int) -> list[list[int]]:
    """The largest items first, each into the set with the least (Graham's LPT)."""
    sets: list[list[int]] = [[] for _ in range(number)]
    sums = [(0.0, index) for index in range(number)]
    amounts = amounts_S.tolist()
    for item in np.argsort(-amounts_S, kind="stable").tolist():
        total, index = sums[0]
        sets[index].append(item)
        heapq.heapreplace(sums, (total + amounts[item], index))
    return sets


def karmarkar_karp(amounts_S: Amounts, number: int) -> list[list[int]]:
    """The largest differencing method: of states that each share some items out over all sets, the two with the largest spread
    become one, the largest set of one with the smallest of the other (Karmarkar and Karp, 1982)."""
    order = np.argsort(-amounts_S, kind="stable").tolist()
    amounts = amounts_S.tolist()
    states: list[tuple[float, int, _State]] = [
        (-amounts[item], item, [(-amounts[item], item, item)]) for item in order
    ]
    # In order of spread, which is a heap already.
    counter = len(states)
    while len(states) > 1:
        _, _, one = heapq.heappop(states)
        _, _, other = states[0]
        merged = _merged(one, other, number, counter)
        heapq.heapreplace(states, (-_spread(merged, number), counter, merged))
        counter += number
    sets = [_items(held) for _, _, held in states[0][2]] if states else []
    return sets + [[] for _ in range(number - len(sets))]


def _spread(state: _State, number: int) -> float:
    least = state[-1][0] if len(state) == number else 0.0
    return least - state[0][0]


def _merged(one: _State, other: _State, number: int, counter: int) -> _State:
    """The i-th largest set of one with the i-th smallest of the other; both are used up. `counter` numbers the new sets."""
    alone_one, alone_other = number - len(other), number - len(one)
    pairs = zip(one[alone_one:], reversed(other[alone_other:]), strict=True)
    joined = [(a[0] + b[0], counter + place, (a[2], b[2])) for place, (a, b) in enumerate(pairs)]
    if len(one) < len(other):
        one, other = other, one
        alone_one, alone_other = alone_other, alone_one
    del one[alone_one:]
    for held in (*other[:alone_other], *joined):
        insort(one, held)
    return one


def _items(held: object) -> list[int]:
    found, stack = [], [held]
    while stack:
        part = stack.pop()
        if isinstance(part, tuple):
            stack += part
        else:
            assert isinstance(part, int)
            found.append(part)
    return sorted(found)
