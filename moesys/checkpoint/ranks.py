"""Steps that all ranks take together, and fail together."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from moesys.checkpoint.errors import CheckpointError, CheckpointMismatch, Superseded

T = TypeVar("T")


class Ranks:
    """The ranks of a process group (None = all ranks); one rank when no group was initialised."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.is_alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.is_alone else dist.get_rank(group)
        self.size = 1 if self.is_alone else dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def each(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank and return this rank's result, once all have succeeded.

        Raises:
            CheckpointError: the same on all ranks if it raised on any, with every rank's reason.
                A CheckpointMismatch, or Superseded, if all reasons are.
        """
        result, cause, failure = None, None, None
        try:
            result = action()
        except Exception as error:  # whatever it is: the other ranks wait for us
            told = isinstance(error, CheckpointError | OSError)
            text = str(error) if told else f"{type(error).__name__}: {error}"
            cause, failure = error, (text, type(error))
        failures = {r: f for r, f in enumerate(self.gather(failure)) if f is not None}
        if failures:
            kinds = {kind for _, kind in failures.values()}
            one = kinds.pop() if len(kinds) == 1 else CheckpointError
            kind = one if one in (CheckpointMismatch, Superseded) else CheckpointError
            raise kind(self._tell({r: text for r, (text, _) in failures.items()})) from cause
        return result  # pyright: ignore[reportReturnType]

    def first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result on every rank; raises as `each`."""
        return self.gather(self.each(lambda: action() if self.rank == 0 else None))[0]  # pyright: ignore[reportReturnType]

    def _tell(self, failures: dict[int, str]) -> str:
        ranks_of: dict[str, list[int]] = {}
        for rank, text in failures.items():
            ranks_of.setdefault(text, []).append(rank)
        if len(ranks_of) == 1 and len(failures) == self.size:
            return next(iter(ranks_of))
        return "\n".join(
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}"
            for text, ranks in ranks_of.items()
        )
