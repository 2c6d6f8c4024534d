"""Items in a number of sets whose sums are about equal. Pure.

Shapes: S items.
"""

import heapq
from bisect import bisect_left, insort

import numpy as np

from moesys.plan.placement import Amounts

_Set = tuple[float, int]
"""The sum, and the item that stands for it."""
_State = list[_Set]
"""Sets of different items, the smallest sums first, without those that are empty."""


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
    become one, the largest set of one with the smallest of the other (Karmarkar and Karp, 1982).

    At first each item is a state. Of those with the same spread the youngest comes first, so that most items come one after the
    other to a state that has others already.
    """
    order = np.argsort(-amounts_S, kind="stable").tolist()
    alone: list[_Set] = [*zip(amounts_S[order].tolist(), order, strict=True), (-np.inf, -1)]
    joined_S = np.arange(len(order)).tolist()
    states: list[tuple[float, int, _State]] = []
    at = age = 0
    while at < len(order) or len(states) > 1:
        if states and -states[0][0] >= alone[at][0]:
            one = heapq.heappop(states)[2]
        else:
            one, at = [alone[at]], at + 1
        rest = -states[0][0] if states else -1.0
        if alone[at][0] > rest:
            at = _grown(one, alone, at, rest, number, joined_S)
        elif states:
            one = _merged(one, heapq.heappop(states)[2], number, joined_S)
        age -= 1
        heapq.heappush(states, (-_spread(one, number), age, one))
    sets: list[list[int]] = [[] for _ in range(number)]
    held = states[0][2] if states else []
    of_item = {item: members for (_, item), members in zip(reversed(held), sets, strict=False)}
    for item, first in enumerate(_ends(joined_S)):
        of_item[first].append(item)
    return sets


def _spread(state: _State, number: int) -> float:
    return state[-1][0] - (state[0][0] if len(state) == number else 0.0)


def _grown(
    one: _State, alone: list[_Set], at: int, rest: float, number: int, joined_S: list[int]
) -> int:
    """With the items from `at` on, for as long as it and the next of them have the largest spreads, that of other states being
    `rest`; the first that it is without."""
    if len(one) < number:
        most = min(at + number - len(one), len(alone))
        after = bisect_left(alone, -rest, at, most, key=lambda held: -held[0])
        one += alone[at:after]
        one.sort()
        return after
    while True:
        amount, item = alone[at]
        total, held = one.pop(0)
        insort(one, (total + amount, held))
        joined_S[item] = held
        at += 1
        if alone[at][0] <= rest or _spread(one, number) < max(rest, alone[at + 1][0]):
            return at


def _merged(one: _State, other: _State, number: int, joined_S: list[int]) -> _State:
    """The i-th largest set of one with the i-th smallest of the other; both are used up."""
    if len(one) < len(other):
        one, other = other, one
    both = max(0, len(one) + len(other) - number)
    added = other[both:]
    for (total, held), (more, gone) in zip(one[:both], reversed(other[:both]), strict=True):
        added.append((total + more, held))
        joined_S[gone] = held
    del one[:both]
    if len(added) < len(one) // 16:
        for held in added:
            insort(one, held)
    else:
        one += added
        one.sort()
    return one


def _ends(next_S: list[int]) -> list[int]:
    """Of the chains that lead from each item to the next; the last leads to itself."""
    end_S = np.array(next_S, dtype=np.int64)
    while (end_S[end_S] != end_S).any():
        end_S = end_S[end_S]
    return end_S.tolist()
