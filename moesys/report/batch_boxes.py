"""What a row of a batch plan's timeline is drawn as: a box for each piece, or for several that are too narrow alone. Pure."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from moesys.plan.batch.plan import BatchPlan
from moesys.plan.batch.timeline import Phase, Span


@dataclass(kw_only=True)
class Box:
    """Work of one micro-step, without a gap."""

    micro_step: int
    phase: Phase | None
    """None = a forward and its backward."""
    sequences: list[int]
    """Empty = what a micro-step costs beside its pieces."""
    begin_s: float
    end_s: float
    keys_s: float = 0.0
    """Waited for keys."""

    def title(self, plan: BatchPlan) -> str:
        """In words."""
        lengths = plan.lengths_S[self.sequences]
        what = "beside its pieces"
        if len(lengths) > 1:
            what = f"{len(lengths)} sequences of {lengths.min():,} to {lengths.max():,} tokens"
        elif len(lengths):
            pieces = plan.micro_steps[self.micro_step]
            ranks = next(p.ranks for p in pieces if p.sequence == self.sequences[0])
            what = f"sequence {self.sequences[0]}, {lengths[0]:,} tokens, on {_spelt(ranks)}"
        words = [what, f"micro-step {self.micro_step}", *([self.phase] if self.phase else [])]
        words.append(f"{self.end_s - self.begin_s:.4g} s from {self.begin_s:.4g} s on")
        if self.keys_s:
            words.append(f"{self.keys_s:.3g} s of it waits for keys")
        return ", ".join(words)


def boxes(
    spans: Iterable[Span], *, with_phases: bool, long: Collection[int], least_s: float
) -> list[Box]:
    """Of spans one after the other.

    Args:
        with_phases: forwards and backwards apart.
        long: sequences that have boxes of their own, however narrow; others share one until it is `least_s`.
    """
    found: list[Box] = []
    for span in spans:
        if span.kind == "idle":
            continue
        assert span.micro_step is not None
        own = [] if span.sequence is None else [span.sequence]
        phase = span.phase if with_phases else None
        last = found[-1] if found else None
        goes_on = (
            last is not None
            and (last.micro_step, last.phase) == (span.micro_step, phase)
            and span.begin_s - last.end_s <= 1e-9 * span.end_s
        )
        if last is None or not goes_on or not _joins(last, own, long, least_s):
            last = Box(
                micro_step=span.micro_step,
                phase=phase,
                sequences=own,
                begin_s=span.begin_s,
                end_s=span.begin_s,
            )
            found.append(last)
        elif own != last.sequences[-1:]:
            last.sequences += own
        last.end_s = span.end_s
        last.keys_s += span.end_s - span.begin_s if span.kind == "keys" else 0.0
    return found


def _joins(last: Box, own: list[int], long: Collection[int], least_s: float) -> bool:
    if own == last.sequences[-1:]:
        return True
    both = [*last.sequences[-1:], *own]
    is_narrow = last.end_s - last.begin_s < least_s
    return is_narrow and len(both) == 2 and not any(sequence in long for sequence in both)


def _spelt(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    in_a_row = sorted(ranks) == list(range(min(ranks), max(ranks) + 1))
    named = f"{min(ranks)} to {max(ranks)}" if in_a_row else ", ".join(map(str, sorted(ranks)))
    return f"{len(ranks)} ranks, {named}"
