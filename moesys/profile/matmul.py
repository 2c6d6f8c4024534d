"""The rate of a large matrix product on this device: the peak that MFU is a share of."""

import statistics
import time

import torch


def matmul_tflops(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Median TFLOP/s of [n, n] @ [n, n]; n = 1024 on a CPU, 8192 on a GPU. Under 0.5 s."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = [product_s(a) for _ in range(repeats + 2)][2:]
    return 2 * n**3 / statistics.median(seconds) / 1e12


def product_s(a: torch.Tensor) -> float:
    """Seconds of `a` [n, n] times itself."""
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    start = time.perf_counter()
    _ = a @ a
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start
