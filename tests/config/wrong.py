"""A wrong configuration as a user types it, and what is said of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moesys.config.compose import compose
from moesys.config.errors import ConfigError, Problem
from moesys.config.validate import check


@dataclass(frozen=True)
class Wrong:
    overrides: str
    """Separated by spaces."""
    key: str
    rule: str
    fix: str
    world_size: int = 2


def refused(overrides: Sequence[str], world_size: int, data: Path) -> tuple[Problem, ...]:
    """The problems that `moesys train` would print; () if there are none."""
    given = [override.replace("DATA", str(data)) for override in overrides]
    if not any(override.startswith(("data.path=", "~data")) for override in given):
        given.append(f"data.path={data}")
    try:
        check(compose(given), world_size)
    except ConfigError as error:
        return error.problems
    return ()
