"""The Makefile installs in the right order, once, and again exactly what changed.

A stand-in for Python notes what it is asked to do, so that no package is really installed.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = f"""\
#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/pip"; cp "$0" "$3/bin/moesys" ;;
  -c*) exec {sys.executable} "$@" ;;
  "prep --input") mkdir -p "$5"; touch "$5/manifest.json" ;;
esac
echo "$(basename "$0") $*" >> "$LOG"
for word; do case $word in */requirements.txt) tr '\\n' ' ' < $word >> "$LOG"; echo >> "$LOG" ;; esac; done
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., list[str]]:
    """make(words...) runs make in a copy of the tree and returns what the stand-in was asked to do."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;\n")
    (tmp_path / "setup.py").write_text("\n")
    for folder in ("launch", "moesys", "tests", "benchmarks"):
        (tmp_path / folder).mkdir()
    for path in (tmp_path / "python", tmp_path / "launch" / "run.sh"):
        path.write_text(STAND_IN)
        path.chmod(0o755)
    log = tmp_path / "log"

    def run(*words: str) -> list[str]:
        log.write_text("")
        environment = {
            k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "TORCH", "VENV", "ARGS"}
        }
        command = ["make", *words, f"PYTHON={tmp_path}/python"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | {"LOG": str(log)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [line for line in log.read_text().splitlines() if "-m venv" not in line]

    return run


def test_torch_comes_first_and_alone_then_the_core_then_the_build(
    make: Callable[..., list[str]],
) -> None:
    torch, core, core_list, megatron, megatron_list, build = make("build")
    assert torch.endswith(
        "install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0"
    )
    assert "-c constraints.txt -r" in core
    assert "hydra-core" in core_list
    assert "pytest" not in core_list
    assert "--no-deps" in megatron
    assert "megatron-core" in megatron_list
    assert build.endswith("--no-build-isolation --no-deps --editable .")


def test_quickstart_installs_the_core_only_trains_and_reports(
    make: Callable[..., list[str]],
) -> None:
    ran = make("quickstart")
    assert not [line for line in ran if "deepspeed" in line or "pytest" in line]
    assert ran[-3:] == [
        "moesys prep --input stdlib --output data/stdlib --vocab-size 2048",
        "run.sh --nproc 2 experiment=quickstart",
        "moesys report runs/quickstart",
    ]
    assert [line.split()[0] for line in make("quickstart")] == ["run.sh", "moesys"], (
        "a second call installs nothing"
    )


def test_second_test_installs_nothing(make: Callable[..., list[str]]) -> None:
    assert len([line for line in make("test") if line.startswith("pip")]) == 5
    marked = "not parity and not oracle and not slurm and not chaos and not whole"
    assert make("test", "ARGS=-x", "WORKERS=3") == [
        f"python -m pytest -n 3 --dist loadfile -m not alone and {marked} -x",
        f"python -m pytest -m alone and {marked} -x",
    ]


def test_what_changed_is_repeated_and_nothing_else(
    make: Callable[..., list[str]], tmp_path: Path
) -> None:
    make("test")
    (tmp_path / "csrc" / "a.cpp").touch()
    assert make("build") == [], "a new date on the same content is no change"
    (tmp_path / "csrc" / "a.cpp").write_text("int b;\n")
    assert [line for line in make("test") if line.startswith("pip")] == [
        "pip install --quiet --disable-pip-version-check -c constraints.txt "
        "--no-build-isolation --no-deps --editable ."
    ]
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n")
    assert len([line for line in make("test") if line.startswith("pip")]) == 5
    assert "torch==2.12.0" in make("build", "TORCH=torch==2.12.0")[0]


def test_a_removed_library_is_built_again(make: Callable[..., list[str]], tmp_path: Path) -> None:
    make("build")
    make("clean")
    assert [line.split()[-2:] for line in make("build")] == [["--editable", "."]]


def test_gpu_stops_early_without_one() -> None:
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "sees no GPU: `make gpu` needs a machine with one" in done.stderr
    assert "build_ext" not in done.stdout


def test_help_lists_every_target_that_people_call() -> None:
    text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in (
        "quickstart",
        "test",
        "parity",
        "lint",
        "format",
        "gpu",
        "bench",
        "docs",
        "clean",
        "help",
    ):
        assert f"\n  {target} " in f"\n{text}"


def test_constraints_pin_exactly_and_leave_torch_out() -> None:
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(line.count("==") == 1 and " " not in line for line in pins)
    assert "torch" not in {line.partition("==")[0] for line in pins}
