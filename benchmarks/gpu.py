"""Everything that needs a GPU, in one go: each test marked `gpu`, then each benchmark with `GPU = True`.

Needs torch with CUDA and pytest, no network and no virtual environment. Writes
benchmarks/results/gpu.json in the common form, also when something failed; the exit status is
non-zero then. `make gpu PYTHON=python3` builds the operators first and calls this.
"""

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.results import ROOT, Cell, write_result

Rows = list[dict[str, Cell]]


def missing() -> str | None:
    """Why nothing can run here, in a sentence; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch: name an interpreter that has, as in `make gpu PYTHON=python3`"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} sees no GPU: `make gpu` needs a machine with one"
    return None


def run_tests() -> tuple[Rows, str | None]:
    """Run the tests marked `gpu`; a row for each, and what went wrong besides (None: nothing).

    Only files that name the mark are collected: others may import what this machine lacks.
    """
    files = [
        str(p)
        for p in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"pytest\.mark\.gpu\b", p.read_text())
    ]
    if not files:
        return [], "no test is marked gpu"
    if importlib.util.find_spec("pytest") is None:
        return [], f"{sys.executable} has no pytest: the tests marked gpu were not run"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # Not pyproject's options: they name plugins and marks that may be absent here.
        command = [
            "-m",
            "pytest",
            "-o",
            "addopts=",
            "-q",
            "-m",
            "gpu",
            f"--junitxml={report}",
            *files,
        ]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        status = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode
        if not report.exists():
            return [], f"pytest ended with status {status} and no report"
        rows = [_row(case) for case in ElementTree.parse(report).iter("testcase")]
    if status != 0:
        return rows, f"pytest ended with status {status}"
    return rows, None if any(
        row["outcome"] == "passed" for row in rows
    ) else "no test marked gpu passed"


def _row(case: ElementTree.Element) -> dict[str, Cell]:
    bad = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    outcome = next((bad[child.tag] for child in case if child.tag in bad), "passed")
    return {
        "test": f"{case.get('classname')}.{case.get('name')}",
        "outcome": outcome,
        "time_s": round(float(case.get("time", 0)), 2),
    }


def run_benchmarks(folder: Path = ROOT / "benchmarks") -> tuple[dict[str, float], Rows, list[str]]:
    """Headline (names prefixed with the benchmark's), rows and failures of the benchmarks with GPU = True."""
    headline: dict[str, float] = {}
    rows: Rows = []
    failures: list[str] = []
    for path in sorted(folder.glob("*.py")):
        if not re.search(r"^GPU = True$", path.read_text(), re.MULTILINE):
            continue
        name = path.stem
        print(f"benchmark {name}", flush=True)
        start = time.monotonic()
        try:
            result = importlib.import_module(f"benchmarks.{name}").run(False, print)
        except Exception as error:  # the others, and the file, still count
            failures.append(f"benchmark {name}: {type(error).__name__}: {error}")
            continue
        headline |= {f"{name}_{key}": value for key, value in result.headline.items()}
        rows += [{"benchmark": name, **row} for row in result.rows]
        headline[f"{name}_took_s"] = round(time.monotonic() - start, 1)
    return headline, rows, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--check", action="store_true", help="only say whether this machine can run it"
    )
    arguments = parser.parse_args()
    if reason := missing():
        print(f"gpu: {reason}", file=sys.stderr)
        return 2
    if arguments.check:
        return 0
    tests, problem = run_tests()
    headline, rows, failures = run_benchmarks()
    if problem:
        failures.insert(0, problem)
    counts = {
        f"tests_{outcome}": float(sum(row["outcome"] == outcome for row in tests))
        for outcome in ("passed", "failed", "skipped")
    }
    failed: Rows = [{"failure": failure} for failure in failures]
    path = write_result("gpu", counts | headline, [*failed, *tests, *rows], "make gpu", quick=False)
    print(f"wrote {path.relative_to(ROOT)}: {', '.join(f'{k} {v:g}' for k, v in counts.items())}")
    for failure in failures:
        print(f"gpu: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
