"""How near a layer's output with codec and wire is to that without, measured where a model is evaluated."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.moe.hooked import Hooked
from moesys.moe.layer import MoELayer


def squares_apart(coded: Tensor, plain: Tensor) -> Tensor:
    """fp64 [2]: sums of squares of the difference and of the plain output."""
    pair = (coded.double() - plain.double(), plain.double())
    return torch.stack([x.square().sum() for x in pair])


class Fidelity(Hooked):
    """While open, each of `layers` (by place) that compresses runs twice in a forward, and the second output is compared.

    What the model goes on with is the plain one.
    """

    def __init__(
        self, layers: Mapping[int, MoELayer], num_layers: int, device: torch.device
    ) -> None:
        self._layers = {at: layer for at, layer in layers.items() if layer.may_compress}
        self.squares_M2 = torch.zeros(num_layers, 2, dtype=torch.float64, device=device)
        """Of each layer, summed over this rank's tokens: of the difference, and of the output."""

    def _hooks(self) -> Iterator[Any]:
        for at, layer in self._layers.items():
            yield layer.register_forward_hook(partial(self._compare, at), with_kwargs=True)

    @torch.no_grad()
    def _compare(
        self, at: int, layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        with layer.compressing():
            coded = layer.forward(*args, **kwargs)[0]
        self.squares_M2[at] += squares_apart(coded, output[0])

    def of_all_ranks(self) -> list[float]:
        """Collective: by layer, the root mean square of the difference over that of the output."""
        squares_M2 = self.squares_M2.clone()
        dist.all_reduce(squares_M2)
        return (squares_M2[:, 0] / squares_M2[:, 1].clamp(min=1e-300)).sqrt().tolist()
