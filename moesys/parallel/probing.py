"""How long the kernel waits for a silent machine before it calls a connection lost. Pure: no socket, no clock.

A connection that carries nothing is asked (TCP keep-alive, RFC 1122, 4.2.3.6): for the first time `idle_s` after
the last packet, then every `interval_s`. After `count` questions without an answer it is lost.
"""

from dataclasses import dataclass

SURVIVED_CUT_S = 5.0
"""A network may be away for so long (a switch that starts again, a link that flaps) and the job goes on."""
FOUND_S = 15
"""A machine that is silent for so long is lost. The ranks that it leaves need up to 10 s more to say so and end."""
_FIRST_RETRY_S = 0.2
"""Linux sends what was not acknowledged again after so long at least, and then after twice the time each."""


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Whole seconds, as the kernel takes them."""

    idle_s: int
    interval_s: int
    count: int

    @property
    def found_s(self) -> int:
        """From the last packet to the end of the connection."""
        return self.idle_s + self.count * self.interval_s

    @property
    def survived_s(self) -> int:
        """A shorter cut is survived whenever it begins: the last question comes after it."""
        return (self.count - 1) * self.interval_s


def probing(found_s: int) -> Probing:
    """The most patient way to find a silent machine after `found_s`, which is at least 4: many questions, late."""
    assert found_s >= 4, found_s
    return Probing(idle_s=2, interval_s=1, count=found_s - 2)


def silence_after_cut_s(cut_s: float) -> float:
    """Longest time without a packet that follows from a cut of `cut_s`, counted from its begin.

    What was sent just before is sent again after `_FIRST_RETRY_S`, then after twice the time each: if that last was
    in vain just before the network came back, as much time again passes.
    """
    return 2 * cut_s + _FIRST_RETRY_S
