"""`moesys doctor`: right about this machine, and quick to say what is wrong with another."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from moesys.cli import machine
from tests.cli.processor_time import children_s

ROOT = Path(__file__).resolve().parents[2]


def doctor(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moesys", "doctor", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
    )


def test_this_machine_is_found_fit(tmp_path: Path) -> None:
    before = children_s()
    done = doctor(["--json"], tmp_path)
    used_s = children_s() - before
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert findings["gloo"]["detail"].startswith("two ranks: exchanged rows")
    assert findings["disk"]["detail"].startswith(str(tmp_path))
    assert findings["python"]["detail"].startswith(sys.version.split()[0])
    assert len(findings) >= 15
    for finding in findings.values():
        assert (finding["level"] == "ok") == (finding["fix"] == ""), finding
    assert used_s < 10.0
    assert list(tmp_path.iterdir()) == []


def test_a_broken_exchange_is_a_failure_with_a_fix(tmp_path: Path) -> None:
    done = doctor([], tmp_path, GLOO_SOCKET_IFNAME="nosuch0")
    assert done.returncode == 1
    assert "FAIL  gloo: two ranks: " in done.stdout
    assert "-> give this machine's name an address in /etc/hosts" in done.stdout
    assert " 1 failures in " in done.stdout


def test_a_folder_that_cannot_be_written_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")
    (finding,) = machine.disk()
    assert finding.level == "fail"
    assert "/proc cannot be written" in finding.detail


def test_few_open_files_are_a_warning() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        files, _ = machine.limits()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (files.level, files.detail) == ("warn", "1024")
    assert files.fix.startswith("ulimit -n 65536")


def test_the_web_toolkit_named_apex_is_told_from_nvidias(tmp_path: Path) -> None:
    assert machine.apex_finding(None).level == "ok"
    assert machine.apex_finding([tmp_path]).level == "fail"
    (tmp_path / "optimizers").mkdir()
    assert machine.apex_finding([tmp_path]) == machine.Finding(
        level="ok", name="apex", detail="NVIDIA's"
    )


def test_a_missing_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    cxx, _ = machine.compilers()
    assert (cxx.level, cxx.detail) == ("warn", "no-such-compiler is not found")
