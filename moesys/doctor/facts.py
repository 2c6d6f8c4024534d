"""What should be the same on every rank of a job."""

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda import nccl

import moesys
from moesys.doctor.software import CORE, version_of

PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "OMP_", "CUDA_")
OF_ONE_NODE = ("_SOCKET_IFNAME", "_IB_HCA", "_VISIBLE_DEVICES", "_HOME", "_PATH")
"""Variables that end so may differ: names of adapters, and of places."""


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how ranks compute and talk."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(PREFIXES) and not name.endswith(OF_ONE_NODE)
    }


def facts_here() -> dict[str, str]:
    """By name; all are text, "none" of what is not there."""
    has_gpu = torch.cuda.is_available()
    count = torch.cuda.device_count() if has_gpu else 0
    driver = Path("/proc/driver/nvidia/version")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moesys": f"{moesys.__version__} {_code_hash(Path(moesys.__file__).parent)}",
        "CUDA": torch.version.cuda or "none",
        "NCCL": ".".join(map(str, nccl.version()))
        if count and dist.is_nccl_available()
        else "none",
        "GPUs": f"{count} x {torch.cuda.get_device_name(0)}" if count else "none",
        "GPU driver": driver.read_text().splitlines()[0] if driver.exists() else "none",
        "kernel": platform.release(),
        "C library": " ".join(platform.libc_ver()),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        **{f"package {name}": version_of(name) or "none" for name in CORE},
        **{f"variable {name}": value for name, value in settings(os.environ).items()},
    }


def _code_hash(package: Path) -> str:
    """Of the source: a copy on one node's disk may be an older one of the same version."""
    found = hashlib.blake2b(digest_size=4)
    for path in sorted(package.rglob("*.py")):
        found.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
