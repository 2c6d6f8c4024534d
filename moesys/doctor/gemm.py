"""One matrix product, timed on every rank at the same time, several times over."""

import torch
import torch.distributed as dist

from moesys.profile.matmul import product_s

NUM_TRIES, NUM_PRODUCTS = 5, 3


def time_products(device: torch.device, quick: bool) -> list[float]:
    """Collective. Per try the least seconds of NUM_PRODUCTS: [n, n] fp32 on CPUs, bf16 on GPUs.

    n is 8192 on a GPU (its full clock and power) and 1024 on a CPU, half of that if `quick`.
    """
    n = (8192 if device.type == "cuda" else 1024) // (2 if quick else 1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds: list[float] = []
    for _ in range(1 + NUM_TRIES):
        dist.barrier()
        seconds.append(min(product_s(a) for _ in range(NUM_PRODUCTS)))
    return seconds[1:]
