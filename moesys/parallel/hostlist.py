"""Slurm's short forms: `n[1-3,07],gpu-a[001-010]` for host names, `4(x2),1` for tasks per node."""

import re
from collections.abc import Iterator

MOST_NAMES = 100_000
"""A list that stands for more hosts is a mistake."""
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(text: str) -> tuple[str, ...]:
    """The host names in order; numbers keep the width of the range's first. Raises ValueError."""
    names: list[str] = []
    for word in _split(text, text):
        for name in _expand(word, text):
            if len(names) == MOST_NAMES:
                raise ValueError(f"{text!r} stands for more than {MOST_NAMES} hosts")
            names.append(name)
    return tuple(names)


def expand_counts(text: str) -> tuple[int, ...]:
    """Tasks on each node: "4(x2),1" is (4, 4, 1). Raises ValueError."""
    counts: list[int] = []
    for word in text.split(","):
        match = _COUNT.fullmatch(word)
        if match is None:
            raise ValueError(f"{text!r} is no list of tasks per node such as 4(x2),1: see {word!r}")
        times = int(match[2] or 1)
        if len(counts) + times > MOST_NAMES:
            raise ValueError(f"{text!r} stands for more than {MOST_NAMES} nodes")
        counts += [int(match[1])] * times
    return tuple(counts)


def _split(text: str, whole: str) -> Iterator[str]:
    """At the commas outside brackets."""
    depth, word = 0, ""
    for letter in text:
        if letter == "," and depth == 0:
            yield _not_empty(word, whole)
            word = ""
            continue
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            break
        word += letter
    if depth != 0:
        raise ValueError(f"{whole!r} is no list of hosts: its brackets do not pair")
    yield _not_empty(word, whole)


def _not_empty(word: str, whole: str) -> str:
    if not word or word != word.strip():
        raise ValueError(f"{whole!r} is no list of hosts: {word!r} is no name")
    return word


def _expand(word: str, whole: str) -> Iterator[str]:
    before, bracket, rest = word.partition("[")
    if not bracket:
        yield before
        return
    numbers, _, after = rest.partition("]")
    for number in _numbers(numbers, whole):
        for tail in _expand(after, whole):
            yield f"{before}{number}{tail}"


def _numbers(text: str, whole: str) -> Iterator[str]:
    for word in text.split(","):
        match = _RANGE.fullmatch(word)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(last) < int(first):
            raise ValueError(f"{whole!r} is no list of hosts: [{word}] is no range such as 1-3")
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))
