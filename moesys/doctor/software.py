"""Python, packages and compilers."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import moesys
from moesys.doctor.command import first_line, output
from moesys.doctor.finding import Finding, Where, fail, ok, warn

MIN_PYTHON, END_PYTHON = (3, 11), (3, 14)
MIN_TORCH = (2, 11)
CORE = (
    *("hydra-core", "jinja2", "markupsafe", "numpy", "omegaconf", "psutil", "pyyaml", "rich"),
    *("safetensors", "tokenizers", "xxhash"),
)
OPTIONAL = (
    *("megatron-core", "deepspeed", "transformers", "wandb", "tensorboard", "matplotlib"),
    *("triton", "mpi4py", "scipy"),
)
CONSTRAINTS = Path(moesys.__file__).resolve().parents[1] / "constraints.txt"
"""The versions that are tested; an installed wheel comes without."""


def judge_python(version: tuple[int, int], text: str) -> Finding:
    if MIN_PYTHON <= version < END_PYTHON:
        return ok("python", text)
    return fail("python", text, "use Python 3.11, 3.12 or 3.13")


def judge_torch(version: str | None) -> Finding:
    needed = ".".join(map(str, MIN_TORCH))
    if version is None:
        return fail(
            "torch", "not installed", f"pip install 'torch>={needed}', before anything else"
        )
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        return fail("torch", version, f"pip install 'torch>={needed}'")
    return ok("torch", version)


def judge_core(versions: Mapping[str, str | None]) -> Finding:
    """Of every package that training needs: its version, None if it is missing."""
    missing = [name for name, version in versions.items() if version is None]
    detail = ", ".join(f"{name} {version or 'is missing'}" for name, version in versions.items())
    if missing:
        return fail("core packages", detail, f"pip install -c constraints.txt {' '.join(missing)}")
    return ok("core packages", detail)


def judge_optional(versions: Mapping[str, str | None]) -> Finding:
    present = [f"{name} {version}" for name, version in versions.items() if version]
    absent = [name for name, version in versions.items() if not version]
    return ok(
        "optional packages",
        f"{', '.join(present) or 'none'}; absent: {', '.join(absent) or 'none'}",
    )


def judge_constraints(
    versions: Mapping[str, str | None], tested: Mapping[str, str] | None
) -> Finding:
    """`tested` by lower-case name; None without a constraints file."""
    if tested is None:
        return ok("tested versions", "not known to an installed package")
    differing = [
        f"{name} {version} ({tested[name]} is tested)"
        for name, version in versions.items()
        if version and tested.get(name, version) != version
    ]
    if differing:
        return warn(
            "tested versions",
            ", ".join(differing),
            "pip install -c constraints.txt with the packages named, or run `make test` with yours",
        )
    return ok("tested versions", "as in constraints.txt")


def judge_apex(entries: Collection[str] | None) -> Finding:
    """What the folder of the package named apex holds, None if there is none. It is not imported to find out."""
    if entries is None:
        return ok("apex", "absent: torch's own fused optimizer is used")
    if "optimizers" in entries:
        return ok("apex", "NVIDIA's")
    return fail(
        "apex",
        "the package of that name in the public registry, a web toolkit, and not NVIDIA's",
        "pip uninstall apex; NVIDIA's is built from source, and optional",
    )


def judge_cxx(compiler: str, version: str) -> Finding:
    if version:
        return ok("C++ compiler", version)
    return warn(
        "C++ compiler",
        f"{compiler} is not found",
        "install g++, or name another in CXX, to build the compiled ops",
    )


def judge_nvcc(release: str, has_gpu: bool) -> Finding:
    if release:
        return ok("nvcc", release)
    if has_gpu:
        return warn(
            "nvcc",
            "absent, on a machine with GPUs",
            "load the CUDA module or set CUDA_HOME, then `make build`: ops run in torch, slower",
        )
    return ok("nvcc", "absent: compiled ops are built for CPUs only")


def read_constraints(text: str) -> dict[str, str]:
    """Versions by lower-case name, with - for _, of the lines name==version."""
    pairs = (line.split("==") for line in text.splitlines() if "==" in line and line[0] != "#")
    return {name.strip().lower().replace("_", "-"): version.strip() for name, version in pairs}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def entries_of(package: str) -> set[str] | None:
    """The names in a package's folders; None if there is no such package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    return {entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()}


def packages(where: Where) -> list[Finding]:
    core, optional = ({name: version_of(name) for name in names} for names in (CORE, OPTIONAL))
    tested = read_constraints(CONSTRAINTS.read_text()) if CONSTRAINTS.exists() else None
    return [
        judge_python(sys.version_info[:2], f"{platform.python_version()} at {sys.executable}"),
        judge_torch(version_of("torch")),
        judge_core(core),
        judge_optional(optional),
        judge_constraints(core | optional, tested),
        judge_apex(entries_of("apex")),
    ]


def compilers(where: Where) -> list[Finding]:
    cxx = os.environ.get("CXX", "g++")
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else "nvcc"
    return [
        judge_cxx(cxx, first_line(output([cxx, "--version"]))),
        judge_nvcc(
            first_line(output([nvcc, "--version"]), containing="release"),
            has_gpu=shutil.which("nvidia-smi") is not None,
        ),
    ]
