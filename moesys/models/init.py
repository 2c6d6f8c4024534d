"""Weights from the seed and the parameter's name alone: the same on every layout and device.

A stacked expert parameter [E, ...] is drawn expert by expert, so that a rank draws only its own; the table of a memory
layer in runs of rows.
"""

from collections.abc import Callable, Sequence

import torch
import xxhash
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.ops.shard import local_boxes, local_rows, local_tensor

RESIDUAL_PROJECTIONS = ("attn.wo.weight", ".down")
"""Names that end so write into the residual stream; their std falls with depth (GPT-2)."""
_RUN_ROWS = 65536
"""Of a memory's table, drawn at once."""
Law = Callable[[Tensor, torch.Generator], Tensor]
"""Fills a tensor and returns it."""


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all parameters and buffers in place: norms 1, other vectors and buffers 0, a memory's core Uniform(0, 1)
    (UltraMem, 2411.12364), the rest Normal(0, std)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = local_tensor(parameter)
            if parameter.ndim == 1:
                local.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            else:
                _draw(f"{seed}:{name}", parameter, local, _law(name, parameter.shape[-1], config))
        for _, buffer in model.named_buffers():
            buffer.zero_()


def _law(name: str, width: int, config: ModelConfig) -> Law:
    """`width` of a row. One of a memory's table, once it is projected to the model's width, is then drawn as what it
    stands for is: a row of a feed-forward's gate, or a column of its down."""
    if name.endswith(".memory.core"):
        return lambda empty, generator: empty.uniform_(0.0, 1.0, generator=generator)
    if ".memory.table." in name:
        std = width**-0.5
    elif name.endswith(RESIDUAL_PROJECTIONS):
        std = config.init_std / (2 * config.num_layers) ** 0.5
    else:
        std = config.init_std
    return lambda empty, generator: empty.normal_(0.0, std, generator=generator)


def _draw(key: str, parameter: Tensor, local: Tensor, law: Law) -> None:
    boxes = local_boxes(parameter)
    assert boxes is not None, f"{key}: this rank's part is no box of the whole"
    if not boxes:
        return
    inside = tuple(slice(at, at + length) for at, length in zip(*boxes[0], strict=True))
    if ".memory.table." in key:
        heads = (slice(0, 1),) * (3 - local.ndim)
        of_heads = local[None] if heads else local
        _draw_rows(key, parameter.shape, of_heads, (*heads, *inside), law)
    elif ".experts." in key:
        for i, expert in enumerate(local_rows(parameter)):
            local[i].copy_(_drawn(f"{key}:{expert}", parameter.shape[1:], law)[inside[1:]])
    else:
        local.copy_(_drawn(key, parameter.shape, law)[inside])


def _draw_rows(
    key: str, shape: torch.Size, local: Tensor, inside: Sequence[slice], law: Law
) -> None:
    """Of a table [(heads,) rows, width], those inside: run by run, of each head."""
    heads, rows, columns = inside
    for head in range(heads.start, heads.stop):
        for first in range(rows.start // _RUN_ROWS * _RUN_ROWS, rows.stop, _RUN_ROWS):
            of_run = torch.Size((min(_RUN_ROWS, shape[-2] - first), shape[-1]))
            drawn = _drawn(f"{key}:{head}:{first}", of_run, law)
            begin, end = max(first, rows.start), min(first + _RUN_ROWS, rows.stop)
            local[head - heads.start, begin - rows.start : end - rows.start].copy_(
                drawn[begin - first : end - first, columns]
            )


def _drawn(key: str, shape: torch.Size, law: Law) -> Tensor:
    """On the CPU in fp32 from a generator of its own, so the device does not matter."""
    generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(key.encode()) & (2**63 - 1))
    return law(torch.empty(shape), generator)
