"""What `moesys doctor` looks at: one function per subject, each yielding findings."""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

GIB = 2**30
MIN_TORCH = (2, 11)
CORE = ("hydra-core", "omegaconf", "numpy", "pyyaml", "rich", "safetensors", "tokenizers", "xxhash")
OPTIONAL = (
    *("megatron-core", "deepspeed", "transformers", "wandb", "tensorboard", "matplotlib"),
    *("triton", "mpi4py"),
)
_EXCHANGE_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    level: Literal["ok", "warn", "fail"]
    name: str
    detail: str
    fix: str = ""
    """What to do; empty if all is well."""


def python() -> Iterator[Finding]:
    supported = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Finding(
        level="ok" if supported else "fail",
        name="python",
        detail=f"{platform.python_version()} at {sys.executable}",
        fix="" if supported else "use Python 3.11, 3.12 or 3.13",
    )


def packages() -> Iterator[Finding]:
    torch_version = _version("torch")
    numbers = tuple(int(part) for part in (torch_version or "0.0").split(".")[:2])
    yield Finding(
        level="ok" if numbers >= MIN_TORCH else "fail",
        name="torch",
        detail=torch_version or "not installed",
        fix="" if numbers >= MIN_TORCH else f"install torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}",
    )
    versions = {name: _version(name) for name in (*CORE, *OPTIONAL)}
    missing = [name for name in CORE if versions[name] is None]
    yield Finding(
        level="fail" if missing else "ok",
        name="core packages",
        detail=", ".join(f"{name} {versions[name] or 'is missing'}" for name in CORE),
        fix=f"pip install {' '.join(missing)}" if missing else "",
    )
    present = [f"{name} {versions[name]}" for name in OPTIONAL if versions[name]]
    absent = [name for name in OPTIONAL if not versions[name]]
    yield Finding(
        level="ok",
        name="optional packages",
        detail=f"{', '.join(present) or 'none'}; absent: {', '.join(absent) or 'none'}",
    )
    yield apex_finding(_package_folders("apex"))


def apex_finding(folders: list[Path] | None) -> Finding:
    """`folders` hold the package named apex, None if there is none. It is not imported to find out."""
    if folders is None:
        return Finding(
            level="ok", name="apex", detail="absent: torch's own fused optimizer is used"
        )
    if any((folder / "optimizers").is_dir() for folder in folders):
        return Finding(level="ok", name="apex", detail="NVIDIA's")
    return Finding(
        level="fail",
        name="apex",
        detail="the package of that name on PyPI, a web toolkit, and not NVIDIA's",
        fix="pip uninstall apex; NVIDIA's is built from source, and optional",
    )


def compilers() -> Iterator[Finding]:
    cxx = os.environ.get("CXX", "g++")
    version = _first_line([cxx, "--version"])
    yield Finding(
        level="ok" if version else "warn",
        name="C++ compiler",
        detail=version or f"{cxx} is not found",
        fix="" if version else "install g++ to build the compiled ops",
    )
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    release = _first_line([nvcc, "--version"], containing="release") if nvcc else ""
    yield Finding(
        level="ok",
        name="nvcc",
        detail=release or "absent: compiled ops are built for CPUs only",
    )


def ops() -> Iterator[Finding]:
    from moesys.ops import library

    state, _, fix = library.status().partition(", run ")
    loaded = library.is_loaded()
    yield Finding(
        level="ok" if loaded else "warn",
        name="compiled ops",
        detail=state,
        fix="" if loaded else f"run {fix}",
    )


def cores() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0))
    quota = _cgroup_cores()
    limited = quota is not None and quota < usable
    threads = os.environ.get("OMP_NUM_THREADS", "unset, moesys train divides the cores among ranks")
    yield Finding(
        level="warn" if limited else "ok",
        name="cores",
        detail=f"{usable} of {os.cpu_count()} usable, OMP_NUM_THREADS {threads}"
        + (f", limited to the time of {quota:g} by the control group" if limited else ""),
        fix=f"set OMP_NUM_THREADS to {max(1, int(quota))} / ranks" if limited and quota else "",
    )


def memory() -> Iterator[Finding]:
    entries = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(entries[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    tight = available < 2 * GIB
    yield Finding(
        level="warn" if tight else "ok",
        name="memory",
        detail=f"{available / GIB:.1f} of {total / GIB:.1f} GiB available",
        fix="the quickstart needs about 2 GiB: close other programs" if tight else "",
    )


def shared_memory() -> Iterator[Finding]:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        yield Finding(
            level="warn",
            name="/dev/shm",
            detail=f"not usable ({error})",
            fix="mount a tmpfs there: processes of one machine exchange data through it",
        )
        return
    yield Finding(
        level="ok" if size >= GIB else "warn",
        name="/dev/shm",
        detail=f"{size / GIB:.1f} GiB",
        fix="" if size >= GIB else "start the container with --shm-size=8g or --ipc=host",
    )


def limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files == resource.RLIM_INFINITY or files >= 4096
    yield Finding(
        level="ok" if enough else "warn",
        name="open files",
        detail="unlimited" if files == resource.RLIM_INFINITY else str(files),
        fix="" if enough else "ulimit -n 65536: each rank opens sockets to all others",
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    infiniband = Path("/sys/class/infiniband")
    has_rdma = infiniband.is_dir() and any(infiniband.iterdir())
    yield Finding(
        level="warn" if has_rdma and not unlimited else "ok",
        name="locked memory",
        detail=("unlimited" if unlimited else f"{locked / GIB:.3g} GiB")
        + ("" if has_rdma else " (no InfiniBand here that would need it)"),
        fix="ulimit -l unlimited: InfiniBand locks its buffers"
        if has_rdma and not unlimited
        else "",
    )


def disk() -> Iterator[Finding]:
    folder = Path.cwd()
    block = os.urandom(2**20)
    num_blocks = 64
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".moesys_doctor_") as file:
            start = time.monotonic()
            for _ in range(num_blocks):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            mb_per_s = num_blocks * len(block) / 1e6 / (time.monotonic() - start)
    except OSError as error:
        yield Finding(
            level="fail",
            name="disk",
            detail=f"{folder} cannot be written ({error.strerror})",
            fix="go to a folder that can, or set run.dir and data.path to one",
        )
        return
    free = shutil.disk_usage(folder).free
    slow, full = mb_per_s < 50, free < 5 * GIB
    yield Finding(
        level="warn" if slow or full else "ok",
        name="disk",
        detail=f"{folder}: {free / GIB:.1f} GiB free, writes {mb_per_s:.0f} MB/s",
        fix=("checkpoints need space: free some" if full else "")
        + ("; " if slow and full else "")
        + ("checkpoints will be slow: set run.dir to another disk" if slow else ""),
    )


def gpus() -> Iterator[Finding]:
    import torch

    driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        yield Finding(
            level="ok",
            name="GPUs",
            detail=f"{', '.join(f'{gpu.name} {gpu.total_memory / GIB:.0f} GiB' for gpu in names)}; "
            f"driver {driver or 'unknown'}, CUDA {torch.version.cuda}",
        )
    elif driver:
        reason = "a CPU build" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        yield Finding(
            level="fail",
            name="GPUs",
            detail=f"driver {driver} is there, but torch {torch.__version__} ({reason}) sees no GPU",
            fix="install the torch build for this driver, and look at CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding(level="ok", name="GPUs", detail="none: training runs on CPUs, over gloo")


def exchange() -> Iterator[Finding]:
    """An all-to-all between two processes, which is what expert parallelism does all day."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory(prefix="moesys_doctor_") as folder:
        start = time.monotonic()
        error = ""
        # fork: no second import of torch; no thread of ours is running that could hold a lock.
        context = torch.multiprocessing.start_processes(
            _exchange_rank,
            (str(Path(folder, "store")),),
            nprocs=2,
            join=False,
            start_method="fork",
        )
        assert context is not None
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() - start > _EXCHANGE_TIMEOUT_S:
                    error = f"no end within {_EXCHANGE_TIMEOUT_S:.0f} s"
                    break
        except Exception as raised:  # whatever a rank raised, with its traceback
            error = str(raised).strip().splitlines()[-1]
        finally:
            for process in filter(None, context.processes):
                if process.is_alive():
                    process.kill()
                process.join()
    yield Finding(
        level="fail" if error else "ok",
        name="gloo",
        detail=f"two ranks: {error or f'exchanged rows in {time.monotonic() - start:.1f} s'}",
        fix="give this machine's name an address in /etc/hosts, or set GLOO_SOCKET_IFNAME (try lo)"
        if error
        else "",
    )


def _exchange_rank(rank: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=_EXCHANGE_TIMEOUT_S)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout
    )
    # Uneven on purpose: rank r sends r + 1 rows to each.
    sent = torch.full((2 * (rank + 1), 1024), float(rank))
    received = torch.empty(3, 1024)
    dist.all_to_all_single(received, sent, [1, 2], [rank + 1, rank + 1])
    if received[:, 0].tolist() != [0.0, 1.0, 1.0]:
        raise RuntimeError(f"rank {rank} received {received[:, 0].tolist()} for [0, 1, 1]")
    dist.destroy_process_group()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_folders(name: str) -> list[Path] | None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    return [Path(folder) for folder in spec.submodule_search_locations or []]


def _first_line(command: list[str], containing: str = "") -> str:
    """The first line of a command's output (with `containing` in it); "" if it cannot be had."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line.strip() for line in done.stdout.splitlines() if containing in line]
    return lines[0] if done.returncode == 0 and lines else ""


def _cgroup_cores() -> float | None:
    """Cores' worth of time that a container may use; None = all."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(python, packages, compilers, ops, cores, memory, shared_memory, limits, disk, gpus),
    exchange,
)
