"""A class of the user's choice, as schema.py's sections name it. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ComponentConfig:
    """A class chosen by its import path (`_target_` in YAML) and its keyword options (all other keys)."""

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
