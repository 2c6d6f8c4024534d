"""Who talks to whom when, so that every pair has its turn and no member is in two pairs at a time. Pure."""

from collections.abc import Sequence

Round = list[tuple[int, int]]


def rounds(members: int) -> list[Round]:
    """Pairs (i, j), i < j, of a round-robin tournament by the circle method: `members` - 1 rounds (`members` if odd).

    Member 0 (or a gap, if the number is odd) stays, the others move on by one seat per round; those who
    face each other are a pair. Every pair of members comes in exactly one round.
    """
    if members < 2:
        return []
    seats: list[int | None] = [*range(members)]
    if members % 2:
        seats.insert(0, None)
    found: list[Round] = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(i, j), max(i, j)) for i, j in facing if i is not None and j is not None])
        seats.insert(1, seats.pop())
    return found


def spread(every: Sequence[Round], limit: int) -> list[Round]:
    """At most `limit` of the rounds, evenly over all of them: near and far neighbours."""
    count = min(limit, len(every))
    return [every[i * len(every) // count] for i in range(count)]
