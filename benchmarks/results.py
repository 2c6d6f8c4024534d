"""The one form of a benchmark's result, and how it reaches the disk.

A benchmark is a module, or a package, beside this one with

    DESCRIPTION: str                                  # one line, shown by `moesys bench --list`
    def run(quick: bool, progress: Callable[[str], None]) -> Result

and, if `make gpu` should run it too, `GPU = True`; if its result is not called NAME_cpu or NAME_gpu, `RESULT`. `run` may
have parameters `seeds` and `only`, which `moesys bench` has options for. `quick` asks for a smoke run of a few seconds;
its figures go to build/bench-quick, never over the real ones. `progress` takes a line for a person.

Standard library only: `make gpu` writes a result where nothing but torch is installed.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import moesys

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "build" / "bench-quick"

PACKAGES = ("torch", "triton", "numpy", "megatron-core", "deepspeed", "transformers")
"""Whose versions decide a figure: the engine and the peers it is compared to."""

Cell = str | int | float | bool | None
Sources = Mapping[str, Mapping[str, Any]]
"""By the first column of a table, the `command` and `env` that gave its rows, where these are not the result's."""
NO_SOURCES: Sources = MappingProxyType({})
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# fmt: off
_ENV_KEYS = {"cpu", "cores", "memory_gib", "gpus", "driver", "os", "python", "moesys", "packages",
             "date", "commit", "dirty"}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a benchmark found."""

    headline: Mapping[str, float]
    """The few figures that the benchmark exists for; a name ends in its unit (`_ms`, `_bytes`, `_ratio`)."""
    rows: Sequence[Mapping[str, Cell]] = field(default_factory=list)
    """Every measurement. Rows with the same columns form one table of docs/benchmarks.md."""
    is_whole: bool = True
    """False: parts of it, or fewer tries than count. Kept apart as a smoke run's figures are."""
    sources: Sources = field(default_factory=dict)
    """Of rows that were measured before."""


def write_result(
    name: str,
    headline: Mapping[str, float],
    rows: Sequence[Mapping[str, Cell]],
    command: str,
    *,
    quick: bool,
    folder: Path | None = None,
    sources: Sources = NO_SOURCES,
) -> Path:
    """Write NAME.json into `folder` (None: where full, or quick, results live) in one step; return its path.

    Adds `env`, what the figures depend on. ValueError names everything that breaks the form.
    """
    record = {
        "name": name,
        "command": command,
        "quick": quick,
        "headline": dict(headline),
        "rows": [dict(row) for row in rows],
        "env": environment(),
        **({"sources": dict(sources)} if sources else {}),
    }
    if faults := form_faults(record):
        raise ValueError(
            f"benchmark {name!r} returned a result that breaks the form:\n  " + "\n  ".join(faults)
        )
    folder = folder or (QUICK_RESULTS if quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(beside, path)
    return path


def check_parts(only: Sequence[str], parts: Mapping[str, Any]) -> None:
    """Raises ValueError for a part of `--only` that there is not."""
    if unknown := set(only) - set(parts):
        raise ValueError(f"--only: no part {', '.join(unknown)}; there are {', '.join(parts)}")


def rows_of_other_parts(
    name: str, parts: Mapping[str, Sequence[str]], only: Sequence[str], quick: bool
) -> tuple[list[dict[str, Any]], Sources]:
    """`rows_of_before` of the parts of a benchmark that are not run again; none of a quick run.

    Args:
        parts: with the first columns of their rows.

    Raises:
        ValueError: `only` has a part that there is not.
    """
    check_parts(only, parts)
    others = [column for part in parts if part not in only for column in parts[part]]
    return rows_of_before(RESULTS / f"{name}.json", [] if quick else others)


def rows_of_before(path: Path, columns: Iterable[str]) -> tuple[list[dict[str, Any]], Sources]:
    """Of the result in this file, if there is one, the rows that have any of the columns, and what gave them."""
    if not path.exists():
        return [], NO_SOURCES
    record = json.loads(path.read_text())
    wanted = set(columns)
    rows = [row for row in record["rows"] if wanted & row.keys()]
    own = {"command": record["command"], "env": record["env"]}
    earlier = record.get("sources", {})
    return rows, {(first := next(iter(row))): earlier.get(first, own) for row in rows}


def tables(rows: Sequence[Mapping[str, Cell]]) -> list[list[Mapping[str, Cell]]]:
    """The rows in tables, one for each set of columns, in order of first appearance."""
    found: dict[tuple[str, ...], list[Mapping[str, Cell]]] = {}
    for row in rows:
        found.setdefault(tuple(row), []).append(row)
    return list(found.values())


def cell_text(value: Cell) -> str:
    """A cell for a reader: four digits of a fraction, thousands apart, nothing for None."""
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
        case int() if not isinstance(value, bool):
            return f"{value:,}"
    return str(value)


def form_faults(record: Any) -> list[str]:
    """What is wrong with the form of a result, all at once; empty if nothing is."""
    if not isinstance(record, dict):
        return ["a result is a JSON object"]
    keys = {"name", "command", "quick", "headline", "rows", "env"}
    if set(record) - {"sources"} != keys:
        return [f"keys are {sorted(record)}, must be {sorted(keys)}"]
    faults: list[str] = []
    for key, kind in {
        "name": str,
        "command": str,
        "quick": bool,
        "headline": dict,
        "rows": list,
        "env": dict,
    }.items():
        if not isinstance(record[key], kind):
            faults.append(f"{key} is a {type(record[key]).__name__}, must be a {kind.__name__}")
    if faults:
        return faults
    if not _NAME.fullmatch(record["name"]):
        faults.append(f"name {record['name']!r} is not lower_case")
    if not record["headline"]:
        faults.append("headline is empty: a benchmark exists for at least one figure")
    for key, value in record["headline"].items():
        if not _NAME.fullmatch(key):
            faults.append(f"headline.{key} is not lower_case")
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            faults.append(f"headline.{key} = {value!r} is not a finite number")
    for index, row in enumerate(record["rows"]):
        if not isinstance(row, dict) or not row:
            faults.append(f"rows[{index}] is not a row of named cells")
            continue
        for key, value in row.items():
            if not isinstance(value, Cell) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                faults.append(
                    f"rows[{index}].{key} = {value!r} is neither text, a finite number, a bool nor null"
                )
    for env in (record["env"], *(source["env"] for source in record.get("sources", {}).values())):
        if set(env) != _ENV_KEYS:
            faults.append(f"env has {sorted(env)}, must have {sorted(_ENV_KEYS)}")
    return faults


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code: machine, software, commit."""
    gpus = _lines("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    # Results and the page made of them may differ from the commit; code may not.
    changed = _lines(
        "git",
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":!benchmarks/results",
        ":!docs/benchmarks.md",
        ":!docs/compression.md",
        ":!docs/reliability.md",
        ":!docs/routers.md",
        ":!docs/*_compared.svg",
    )
    commit = _lines("git", "rev-parse", "HEAD")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [line.split(",")[0].strip() for line in gpus],
        "driver": gpus[0].split(",")[1].strip() if gpus else None,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "moesys": moesys.__version__,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit[0] if commit else None,
        "dirty": bool(changed) if commit else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _lines(*command: str) -> list[str]:
    """A program's output lines; none where it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
