"""All candidates of each layer, tried on the tokens that a forward brings: how far the output goes off, bytes, and time."""

import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.moe.compression import UNCOMPRESSED
from moesys.moe.fidelity import squares_apart
from moesys.moe.hooked import Hooked
from moesys.moe.layer import MoELayer
from moesys.ops.autocast import compute_type
from moesys.parallel.exchange import Traffic
from moesys.plan.codec_choice import Trial

REPEATS = 3
"""Of which the median time counts."""


class Trials(Hooked):
    """While open, each of `layers` (by place) runs again in a forward, once uncompressed and once with each of its candidates.

    All layers have the same candidates. What the model goes on with is the plain output.
    """

    def __init__(
        self,
        layers: Mapping[int, MoELayer],
        num_layers: int,
        num_candidates: int,
        forwards: int = 1,
    ) -> None:
        """`forwards`: of each layer in a step, recomputations included, which its bytes are to be of."""
        self._layers, self._forwards = layers, forwards
        shape = (num_layers, 1 + num_candidates)
        self._sums_MX3 = torch.zeros(*shape, 3, dtype=torch.float64)
        """Squares of the difference and of the output; bytes."""
        self._ms_MX = torch.zeros(shape, dtype=torch.float64)

    def _hooks(self) -> Iterator[Any]:
        for at, layer in self._layers.items():
            yield layer.register_forward_hook(partial(self._try, at), with_kwargs=True)

    @torch.no_grad()
    def _try(
        self, at: int, layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        for x, candidate in enumerate([UNCOMPRESSED, *layer.candidates.values()]):
            with layer.compressing(candidate):
                again = [_timed(layer, args, kwargs) for _ in range(REPEATS)]
            coded, forward_bytes, _ = again[-1]
            d_row = layer.config.d_latent or layer.d_model
            width = compute_type(coded[:0]).element_size()
            there, back = candidate.formats.row_bytes(d_row, width)
            sent_bytes = forward_bytes * (self._forwards + back / there)
            squares = squares_apart(coded, output[0]).tolist()
            self._sums_MX3[at, x] += torch.tensor([*squares, sent_bytes], dtype=torch.float64)
            self._ms_MX[at, x] += statistics.median(ms for _, _, ms in again)

    def of_all_ranks(self, device: torch.device) -> list[list[Trial]]:
        """Collective: by layer and candidate, the first being none; the same on all ranks."""
        sums_MX3, ms_MX = self._sums_MX3.to(device), self._ms_MX.to(device)
        dist.all_reduce(sums_MX3)
        dist.all_reduce(ms_MX, dist.ReduceOp.MAX)
        return [
            [
                Trial(error=(off / max(whole, 1e-300)) ** 0.5, sent_bytes=int(sent), ms=ms)
                for (off, whole, sent), ms in zip(sums_X3, ms_X, strict=True)
            ]
            for sums_X3, ms_X in zip(sums_MX3.tolist(), ms_MX.tolist(), strict=True)
        ]


def _timed(
    layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, int, float]:
    """A forward's output, the bytes that it sent, and its milliseconds."""
    _wait_for_device()
    began = time.perf_counter()
    y = layer.forward(*args, **kwargs)[0]
    _wait_for_device()
    ms = (time.perf_counter() - began) * 1e3
    meters = [exchange.meter for exchange in layer.dispatcher.exchanges()]
    return y, Traffic.total(meter.read() for meter in meters).sent_bytes, ms


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
