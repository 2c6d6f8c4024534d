"""What can be wrong with a checkpoint."""

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or trusted: disk full, missing file, flipped bit."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint of something else: other names, shapes or dtypes than the request. An older one is no remedy."""


class Superseded(CheckpointError):
    """This job may write here no longer: a later start has taken the folder over."""


def itemize(heading: str, problems: Sequence[str], limit: int = 20) -> str:
    """One problem on the heading's line, several below it; past `limit` they are counted."""
    if len(problems) == 1:
        return f"{heading}: {problems[0]}"
    shown = list(problems[:limit])
    if len(problems) > limit:
        shown.append(f"and {len(problems) - limit} more")
    return f"{heading}: {len(problems)} problems" + "".join(f"\n  - {problem}" for problem in shown)
