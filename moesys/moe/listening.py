"""To hear what routers decide in a model's forwards, whoever runs them."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from torch import nn

from moesys.moe.hooked import Hooked
from moesys.moe.layer import MoELayer
from moesys.moe.routing import RoutingResult
from moesys.moe.tokens import Known


class Hear(Protocol):
    def __call__(self, at: int, layer: MoELayer, known: Known, routed: RoutingResult) -> None:
        """The `layer`, at place `at` among the MoE layers, routed tokens of which this is known."""
        ...


class Listening(Hooked):
    """While open, `hear` is told of every routing of `layers` (by place), before anything is dropped. A recomputation routes
    nothing again."""

    def __init__(self, layers: Mapping[int, MoELayer], hear: Hear) -> None:
        self._layers = layers
        self._hear = hear
        self._running: tuple[int, MoELayer, Known] | None = None

    def _hooks(self) -> Iterator[Any]:
        for router in {layer.router for layer in self._layers.values()}:  # layers may share one
            yield router.register_forward_hook(self._routed)
        for at, layer in self._layers.items():
            yield layer.register_forward_pre_hook(partial(self._enter_layer, at))

    def _enter_layer(self, at: int, layer: MoELayer, args: tuple[Any, ...]) -> None:
        known = next((arg for arg in args if isinstance(arg, Known)), Known())
        self._running = at, layer, known

    def _routed(self, _router: nn.Module, _args: Any, routed: RoutingResult) -> None:
        assert self._running is not None, "a router runs inside of its layer"
        if not self._running[1].runs_again:
            self._hear(*self._running, routed)
