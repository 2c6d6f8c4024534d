"""What this build of torch can do here: compiled ops, GPUs, backends of collectives."""

import shutil

import torch
import torch.distributed as dist
from torch.cuda import nccl

from moesys.doctor.finding import Finding, Where, fail, ok, warn
from moesys.ops import library


def judge_ops(status: str, is_loaded: bool) -> Finding:
    """`status` as `moesys.ops.library` says it: what runs, and what builds the rest."""
    state, _, fix = status.partition(", run ")
    return ok("compiled ops", state) if is_loaded else warn("compiled ops", state, f"run {fix}")


def judge_torch_gpus(gpus: list[str], has_driver: bool, torch_build: str) -> Finding:
    """`gpus`: those that torch sees; `torch_build`: its version and the CUDA it is for."""
    if gpus:
        return ok("GPUs", f"torch {torch_build} sees {', '.join(gpus)}")
    if has_driver:
        return fail(
            "GPUs",
            f"a driver is there, but torch {torch_build} sees no GPU",
            "install the torch build for this driver, and look at CUDA_VISIBLE_DEVICES",
        )
    return ok("GPUs", "none: training runs on CPUs, over gloo")


def judge_backends(has_gloo: bool, has_nccl: bool, num_gpus: int, nccl_version: str) -> Finding:
    detail = f"gloo {'yes' if has_gloo else 'no'}, NCCL {nccl_version if has_nccl else 'no'}"
    if not has_gloo:
        return fail("backends", detail, "install a torch build with gloo: every run uses it")
    if num_gpus and not has_nccl:
        return fail("backends", detail, "install a torch build with NCCL: GPUs talk through it")
    return ok("backends", detail)


def ops(where: Where) -> list[Finding]:
    return [judge_ops(library.status(), library.is_loaded())]


def gpus_and_backends(where: Where) -> list[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    build = "a CPU build" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    has_nccl = dist.is_available() and dist.is_nccl_available()
    version = ".".join(map(str, nccl.version())) if has_nccl and count else "yes"
    return [
        judge_torch_gpus(
            [f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in properties],
            shutil.which("nvidia-smi") is not None,
            f"{torch.__version__} ({build})",
        ),
        judge_backends(dist.is_available() and dist.is_gloo_available(), has_nccl, count, version),
    ]
