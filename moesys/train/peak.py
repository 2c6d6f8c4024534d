"""The peak that MFU is a share of: measured at a run folder's first start on a machine, and kept for those that follow."""

import json
import math
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from moesys.profile.matmul import matmul_tflops
from moesys.train.folder import write_text
from moesys.train.setup import Run

FILE_NAME = "peak.json"
Conditions = dict[str, str | int]
"""All that a peak depends on."""


def peak_tflops(run: Run, dtype: torch.dtype) -> tuple[float, str]:
    """TFLOP/s of rank 0's device and where they are from; nan on other ranks, which record nothing and need not measure."""
    config, process = run.config, run.process
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops, "set by metrics.peak_tflops"

    if process.rank:
        return math.nan, "rank 0's"
    on_gpu = process.device.type == "cuda"
    conditions: Conditions = {
        "node": process.node,
        "device": torch.cuda.get_device_name(process.device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": config.train.dtype,
        "torch": torch.__version__,
    }
    tflops, was_kept = kept(
        run.folder / FILE_NAME, conditions, lambda: matmul_tflops(process.device, dtype)
    )
    how = f"kept from {FILE_NAME}" if was_kept else "measured"
    return tflops, f"{how}, a large {config.train.dtype} matrix product on rank 0"


def kept(path: Path, conditions: Conditions, measure: Callable[[], float]) -> tuple[float, bool]:
    """What `path` says of the same conditions, and True; else what `measure` says, which is then kept there."""
    saved = json.loads(path.read_text()) if path.exists() else {}
    if saved.get("conditions") == conditions:
        return saved["tflops"], True
    tflops = measure()
    write_text(path, json.dumps({"tflops": tflops, "conditions": conditions}) + "\n")
    return tflops, False
