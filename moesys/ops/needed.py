"""Which gradients a backward pass is really run for.

`ctx.needs_input_grad` only knows what requires a gradient. A zero-bubble schedule runs backward twice, once for inputs and
once for weights; a Function that ignores which would do all of its work in both.
"""

from typing import Any

import torch


def needed_gradients(ctx: Any) -> tuple[bool, ...]:
    """For each input tensor of the Function whose backward runs: whether its gradient goes anywhere."""
    return tuple(node is not None and _is_reached(node) for node, _ in ctx.next_functions)


def _is_reached(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return True  # its answer for a leaf that autograd.grad was asked for
