"""How many bytes travel in a step for a row of an expert, and for a copy of one. Pure."""

import math

from moesys.config.dispatch_schema import Wire
from moesys.config.schema import RunConfig
from moesys.plan.costs import expert_parameters

FP32 = 4


def row_bytes(config: RunConfig) -> float:
    """Of a row, there and back in forward and backward. Infinite where a codec leaves open how many rows travel."""
    if config.dispatch.codec is not None or config.dispatch.candidates:
        return math.inf
    wire, forwards = config.dispatch.wire, config.train.exchanging_forwards

    def once(kind: Wire) -> int:
        return wire.row_bytes(kind, config.model.d_row, config.train.compute_bytes)

    return (
        forwards * (once(wire.dispatch_forward) + once(wire.combine_forward))
        + once(wire.combine_backward)
        + once(wire.dispatch_backward)
    )


def travels(config: RunConfig, micro_steps: int) -> tuple[int, int]:
    """Of a copy in a step: how often there, and its gradient home."""
    return (2 * micro_steps, micro_steps) if config.placement.release else (1, 1)


def chunk_bytes(config: RunConfig, micro_steps: int) -> float:
    """Of an expert on its way, on one rank of parallel.etp: the mean of a step's, parameters there and gradients back."""
    travelling = sum(travels(config, micro_steps))
    return _copy_bytes(config, micro_steps) / travelling / config.parallel.etp


def copy_in_rows(config: RunConfig, micro_steps: int) -> float:
    """How many rows of a step, there and back in forward and backward, are as many bytes as a copy of their expert that stays
    for the step, and its gradient. Infinite where that is not known, or `placement.near=false` wants it left out."""
    of_row_bytes = row_bytes(config)
    if math.isinf(of_row_bytes) or not config.placement.near:
        return math.inf
    return _copy_bytes(config, micro_steps) / of_row_bytes


def _copy_bytes(config: RunConfig, micro_steps: int) -> float:
    gathers, reduces = travels(config, micro_steps)
    each = gathers * config.train.compute_bytes + reduces * FP32
    return expert_parameters(config.model) * each
