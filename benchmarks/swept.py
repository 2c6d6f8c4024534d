"""Sweeps of training runs as parts of benchmarks: `moesys sweep` on two ranks, which does nothing again that is done."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results import ROOT
from moesys.sweep.points import points_of

Variants = Mapping[str, Sequence[str]]
"""A list of overrides for each row's name."""


def variants_of(name: str) -> dict[str, list[str]]:
    """Of a file of benchmarks/sweeps."""
    return yaml.safe_load((ROOT / "benchmarks" / "sweeps" / f"{name}.yaml").read_text())


def kept_folder(name: str) -> Path:
    """Where a sweep's runs stay."""
    return ROOT / "runs" / f"{name}.sweep"


def sweep(
    variants: Variants,
    words: Sequence[str],
    seeds: int,
    folder: Path,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Train each variant of `words` with each seed; return the lines of the table, which is beside the runs.

    Raises ValueError where a run failed; what it said stands in its folder.
    """
    name = folder.name.removesuffix(".sweep")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, f"{name}.yaml")
        file.write_text(yaml.safe_dump(dict(variants), sort_keys=False))
        options = ["--nproc", "2", "--variants", str(file), "--folder", str(folder), "--json"]
        swept = "run.seed=" + ",".join(map(str, range(seeds)))
        with subprocess.Popen(
            [sys.executable, "-m", "moesys", "sweep", *options, *words, "--sweep", swept],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stderr:
                progress(f"{name}: {line.rstrip()}")
            table = process.stdout.read()
    if process.returncode:
        raise ValueError(f"the sweep {name} failed, in {folder}: run it again")
    return json.loads(table)


def run_folders(variants: Variants, seeds: int, folder: Path) -> dict[str, list[Path]]:
    """The runs of each row, by seed."""
    found: dict[str, list[Path]] = {name: [] for name in variants}
    for point in points_of([], variants, [[f"run.seed={seed}"] for seed in range(seeds)]):
        found[point.row].append(folder / point.name)
    return found


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run that ended."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
