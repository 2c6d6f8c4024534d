"""The part of a checkpoint that is the model, under one prefix."""

from torch import Tensor, nn

from moesys.ops.shard import detached

WEIGHTS = "model."
"""What the names of parameters and buffers begin with in a checkpoint."""


def weight_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that are saved, by their names in a checkpoint; the tensors themselves, not copies."""
    named = {f"{WEIGHTS}{name}": detached(p) for name, p in model.named_parameters()}
    saved = model.state_dict().keys()
    return named | {f"{WEIGHTS}{name}": b for name, b in model.named_buffers() if name in saved}
