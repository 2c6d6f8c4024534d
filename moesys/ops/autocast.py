"""The type that products compute in, where torch's autocast is on."""

import torch
from torch import Tensor


def compute_type(x: Tensor) -> Tensor:
    """x in autocast's type, differentiable; x itself without autocast. Cast once what several products read or what travels."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return x.to(torch.get_autocast_dtype(device_type))
    return x
