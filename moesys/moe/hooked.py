"""What is open for a while, and hears of forwards through hooks as long."""

from collections.abc import Iterator
from typing import Any, Self


class Hooked:
    """A context: `_hooks` are registered where it is opened, and removed where it is closed."""

    _registered: tuple[Any, ...] = ()

    def _hooks(self) -> Iterator[Any]:
        """Register them; handles, each with `remove`."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._registered = tuple(self._hooks())
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._registered:
            hook.remove()
