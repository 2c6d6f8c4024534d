"""Values that a rule allows, on both sides of one that it does not."""

from collections.abc import Callable, Iterable, Iterator

from moesys.config.errors import Problem

_FAR = 10_000


def in_range(
    key: str,
    value: float,
    at_least: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Iterator[Problem]:
    """The problem of a value that is outside the bounds given."""
    bounds = [
        (at_least, "at least", lambda bound: value >= bound),
        (above, "above", lambda bound: value > bound),
        (below, "below", lambda bound: value < bound),
        (at_most, "at most", lambda bound: value <= bound),
    ]
    given = [bound for bound in bounds if bound[0] is not None]
    if not all(holds(bound) for bound, _, holds in given):
        rule = " and ".join(f"{words} {bound}" for bound, words, _ in given)
        yield Problem(key=key, given=value, rule=f"must be {rule}", fix=f"use a value {rule}")


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def nearest(allowed: Iterable[int], value: int) -> str:
    """Of `allowed`, in ascending order, the last below and the first above `value`: "2 or 4"."""
    values = list(allowed)
    lower = [v for v in values if v < value][-1:]
    upper = [v for v in values if v > value][:1]
    return " or ".join(map(str, lower + upper))


def multiples_near(step: int, value: int, fits: Callable[[int], bool] = lambda _: True) -> str:
    """The multiples of `step` on both sides of `value` that fit, without 0: "4 or 8". "" if none is near."""
    below = range(value // step * step, 0, -step)[:_FAR]
    above = range((value // step + 1) * step, (value // step + 1 + _FAR) * step, step)
    found = [next(filter(fits, side), 0) for side in (below, above)]
    return " or ".join(str(multiple) for multiple in found if multiple > 0)
