"""The compiled library: how it is built, found and done without."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesys.ops import expert_order, library, permute, reference, swiglu, unpermute
from tests.ops.cases import TESTED, inputs

ROOT = Path(__file__).resolve().parents[2]


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")


def run_build(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def build(*arguments: str, **environment: str) -> str:
    result = run_build(*arguments, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_nvcc
def test_every_source_compiles_and_only_once() -> None:
    """CUDA too, with any torch and without a GPU. Objects are kept, so this is slow only once."""
    build("--compile-only", TORCH_CUDA_ARCH_LIST="9.0")
    again = build("--compile-only", TORCH_CUDA_ARCH_LIST="9.0")
    assert "moesys build" in again
    assert not re.search(r"^  compile  ", again, re.M)


def test_a_second_build_changes_nothing() -> None:
    before = library.PATH.stat()
    out = build("--inplace")
    assert not re.search(r"^  (compile|link)  ", out, re.M)
    assert library.PATH.stat().st_mtime_ns == before.st_mtime_ns
    assert torch.__version__ in out


def test_only_the_stable_abi_is_used() -> None:
    """No C++ symbol of torch, so one build serves torch 2.11 and later."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library.PATH)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "torch_call_dispatcher" in symbols
    assert not re.findall(r"_Z\w*(?:c10|at|torch)\w*", symbols)


def test_a_missing_torch_is_explained() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "sys.argv = ['setup.py', 'build_ext', '--inplace']; runpy.run_path('setup.py')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Install torch >= 2.11 first" in result.stderr


@needs_nvcc
def test_a_wrong_architecture_is_explained() -> None:
    result = run_build("--compile-only", TORCH_CUDA_ARCH_LIST="9.0;hopper")
    assert result.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST has 'hopper'" in result.stderr


def test_status_names_the_devices() -> None:
    assert library.status().startswith("moesys.ops: compiled for cpu")
    assert library.runs_on(torch.empty(0))
    assert library.runs_on(torch.empty(0, device="meta"))


@pytest.mark.parametrize("broken", [False, True], ids=["absent", "broken"])
def test_without_the_library(broken: bool, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "libmoesys.so"
    if broken:
        path.write_bytes(b"not a library")
    monkeypatch.setattr(library, "PATH", path)
    devices, status = library._load()
    assert not devices
    assert "reference (slow)" in status
    assert "python setup.py build_ext --inplace" in status
    assert ("does not load" if broken else "is not built") in status
    assert "\n" not in status


def test_without_the_library_ops_are_the_reference(monkeypatch) -> None:
    data = inputs(TESTED[1])
    with_library = expert_order(data.topk_ids_TK, 8)
    monkeypatch.setattr(library, "_DEVICES", frozenset())
    called = []
    for op in ("expert_order", "permute", "unpermute", "swiglu"):
        function = getattr(reference, op)
        monkeypatch.setattr(
            reference, op, lambda *a, f=function, n=op: (called.append(n), f(*a))[1]
        )
    row_of_slot_TK, slot_of_row_N, counts_E = expert_order(data.topk_ids_TK, 8)
    torch.testing.assert_close((row_of_slot_TK, slot_of_row_N, counts_E), with_library)
    x_TD = data.x_TD.requires_grad_()
    rows_ND = permute(x_TD, slot_of_row_N, row_of_slot_TK)
    swiglu(unpermute(rows_ND, data.weights_TK, row_of_slot_TK)[:, :64]).sum().backward()
    assert x_TD.grad is not None
    assert called == ["expert_order", "permute", "unpermute", "swiglu"]
