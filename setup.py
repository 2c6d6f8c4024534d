"""Builds the compiled ops. What the package is and needs is in pyproject.toml.

    pip install -e . --no-build-isolation --no-deps     # torch must be installed first
    python setup.py build_ext --inplace                 # the compiled ops alone
    python setup.py build_ext --inplace --compile-only  # compile every source, link nothing

One shared library, moesys/libmoesys.so, is built from csrc/ on torch's stable ABI, so a build made
with any torch from 2.11 on runs with later ones. CUDA kernels are part of it iff nvcc is found
(CUDA_HOME, then PATH) and torch is a CUDA build; no device is ever asked. TORCH_CUDA_ARCH_LIST
names the architectures ("8.0;9.0;10.0+PTX" unless set), MAX_JOBS the compilers run at once.
Objects are named by a hash of all that goes into them, so nothing is compiled twice.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LIBRARY = "libmoesys.so"
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"
MIN_TORCH = (2, 11)


class Toolchain:
    """Compilers, flags and the reasons for them. Needs torch, but no device."""

    def __init__(self) -> None:
        try:
            import torch
        except ImportError:
            raise SystemExit(
                "moesys is built against the torch that is installed, and none is. Install torch >= "
                f"{'.'.join(map(str, MIN_TORCH))} first, then: pip install --no-build-isolation ."
            ) from None
        found = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if found < MIN_TORCH:
            raise SystemExit(
                f"moesys needs torch >= {'.'.join(map(str, MIN_TORCH))}, found {torch.__version__}"
            )
        self.torch_version = torch.__version__
        self.torch_cuda = torch.version.cuda
        self.torch_dir = Path(torch.__file__).resolve().parent
        self.cxx = os.environ.get("CXX", "g++")
        self.nvcc = find_nvcc()
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
        self.cxx_version = first_line([self.cxx, "--version"])
        self.nvcc_version = first_line([self.nvcc, "--version"], last=True) if self.nvcc else ""

    @property
    def links_cuda(self) -> bool:
        return bool(self.nvcc and self.torch_cuda)

    def summary(self) -> str:
        if not self.nvcc:
            cuda = "no (nvcc not found through CUDA_HOME or PATH)"
        elif not self.torch_cuda:
            cuda = f"no (torch is a CPU build; nvcc is {self.nvcc})"
        else:
            cuda = f"yes ({self.nvcc}, architectures {self.archs})"
        return "\n".join(
            [
                "moesys build",
                f"  torch     {self.torch_version} at {self.torch_dir}",
                f"  compiler  {self.cxx_version}",
                f"  CUDA      {cuda}",
            ]
        )

    def compile_command(self, source: Path) -> list[str]:
        # The oldest torch whose stable ABI is asked for.
        target = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000ULL"
        include = ["-isystem", str(self.torch_dir / "include")]
        shared = ["-std=c++20", "-O3", f"-DTORCH_TARGET_VERSION={target}", *include]
        if source.suffix == ".cu":
            assert self.nvcc
            return [
                *[self.nvcc, *shared, "-DUSE_CUDA", "-Xcompiler", "-fPIC,-Wall"],
                *["--expt-relaxed-constexpr", "-lineinfo", *gencode(self.archs)],
            ]
        # fopenmp-simd: `omp simd` only; threads are torch's. No flag here changes a result's meaning.
        simd = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
        return [self.cxx, *shared, "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", *simd]

    def link_command(self) -> list[str]:
        libraries = ["-L" + str(self.torch_dir / "lib"), "-ltorch_cpu"]
        if self.links_cuda:
            assert self.nvcc
            return [
                self.nvcc,
                "-shared",
                "-cudart",
                "shared",
                *libraries,
                "-ltorch_cuda",
                "-lc10_cuda",
            ]
        return [self.cxx, "-shared", *libraries]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (nvcc := Path(home, "bin", "nvcc")).is_file():
        return str(nvcc)
    return shutil.which("nvcc")


def first_line(command: list[str], *, last: bool = False) -> str:
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return lines[-1 if last else 0]


def gencode(archs: str) -> list[str]:
    """nvcc flags of a TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0a;10.0+PTX"."""
    flags = []
    for arch in re.split(r"[;,\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", arch)
        if not match:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST has {arch!r}; entries look like 9.0, 9.0a or 10.0+PTX"
            )
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def digest(*parts: str | bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part if isinstance(part, bytes) else part.encode())
        state.update(b"\0")
    return state.hexdigest()[:16]


def run_into(command: list[str], output: Path) -> None:
    """Run a compiler that writes `output`, which appears whole or not at all."""
    partial = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)
    os.replace(partial, output)


class BuildOps(build_ext):
    user_options: ClassVar = [
        *build_ext.user_options,
        ("compile-only", None, "compile every source, link nothing"),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "compile-only"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.compile_only = False

    def get_ext_filename(self, fullname: str) -> str:
        # A plain shared library: it needs no Python, so it carries no Python version in its name.
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def run(self) -> None:
        toolchain = Toolchain()
        print(toolchain.summary(), flush=True)
        cpu = [CSRC / "library.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
        cuda = sorted((CSRC / "cuda").glob("*.cu"))
        if self.compile_only:
            self.compile(toolchain, cpu + (cuda if toolchain.nvcc else []))
            return
        objects = self.compile(toolchain, cpu + (cuda if toolchain.links_cuda else []))
        library = self.link(toolchain, objects)
        for ext in self.extensions:
            inplace = self.inplace or getattr(self, "editable_mode", False)
            target = (
                ROOT / self.get_ext_filename(ext.name)
                if inplace
                else Path(self.get_ext_fullpath(ext.name))
            )
            install(library, target)

    def compile(self, toolchain: Toolchain, sources: list[Path]) -> list[Path]:
        headers = [path.read_bytes() for path in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])]
        folder = ROOT / "build" / "objects"
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source: Path) -> Path:
            command = toolchain.compile_command(source)
            version = toolchain.nvcc_version if source.suffix == ".cu" else toolchain.cxx_version
            key = digest(*command, version, toolchain.torch_version, source.read_bytes(), *headers)
            output = folder / f"{'-'.join(source.relative_to(CSRC).parts)}-{key}.o"
            if not output.exists():
                print(f"  compile   {source.relative_to(ROOT)}", flush=True)
                run_into([*command, "-c", str(source)], output)
            return output

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(compile_one, sources))

    def link(self, toolchain: Toolchain, objects: list[Path]) -> Path:
        command = [*toolchain.link_command()]
        output = ROOT / "build" / "objects" / f"{digest(*command, *map(str, objects))}-{LIBRARY}"
        if not output.exists():
            print(f"  link      {LIBRARY}", flush=True)
            # Objects before libraries: linkers resolve from left to right.
            run_into([command[0], *map(str, objects), *command[1:]], output)
        return output

    # What editable installs and wheels ask for.
    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.*"))]


def install(library: Path, target: Path) -> None:
    """Copy beside and rename: a process that has the old library loaded keeps it whole."""
    if target.exists() and target.read_bytes() == library.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(library, partial)
    os.replace(partial, target)


def shared_files() -> list[tuple[str, Sequence[str]]]:
    """configs/ and launch/ as data_files: one entry per folder, under share/moesys/."""
    folders: dict[str, list[str]] = {}
    for path in sorted([*(ROOT / "configs").rglob("*"), *(ROOT / "launch").rglob("*")]):
        if path.is_file():
            relative = path.relative_to(ROOT)
            folders.setdefault(f"share/moesys/{relative.parent.as_posix()}", []).append(
                str(relative)
            )
    return [(folder, folders[folder]) for folder in sorted(folders)]


setup(
    package_data={"moesys": [LIBRARY]},
    data_files=shared_files(),
    # A name for build_ext to hang the library on; the sources are found by BuildOps.
    ext_modules=[Extension("moesys.ops_library", sources=[])],
    cmdclass={"build_ext": BuildOps},
)
