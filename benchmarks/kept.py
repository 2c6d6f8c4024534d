"""Parts of a long benchmark, kept on disk as they are measured: one that was interrupted goes on with those it lacks.

A part counts only for the same code, machine, software and settings, which is what its folder is named by.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, environment

KEPT = ROOT / "build" / "bench-parts"
_CODE = ("moesys", "configs", "csrc", "launch", "benchmarks", "tests/launch")
_NO_CODE = {"__pycache__", "results"}
_OF_THE_MOMENT = ("date", "commit", "dirty")
"""Of an environment; the code itself is compared."""


class KeptParts:
    """What is known already of one benchmark under these settings; any JSON."""

    def __init__(self, name: str, settings: Mapping[str, Any], root: Path = KEPT) -> None:
        self.folder = root / name / identity(settings)
        self.runs = self.folder / "runs"
        """For what a part leaves while it is measured."""

    def get(self, part: str) -> Any:
        """The part; None if it has not been measured."""
        path = self._path(part)
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, part: str, found: Any) -> None:
        path = self._path(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(found) + "\n")
        os.replace(beside, path)

    def clear(self) -> None:
        """Forget all parts, and what runs have left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.json"


def identity(settings: Mapping[str, Any]) -> str:
    """A name for the code as it lies here, this machine and its software, and the settings."""
    where = {key: value for key, value in environment().items() if key not in _OF_THE_MOMENT}
    digest = hashlib.sha256(json.dumps([where, dict(settings)], sort_keys=True).encode())
    for path in _code():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _code() -> Iterator[Path]:
    for folder in _CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and not _NO_CODE & set(path.relative_to(ROOT).parts):
                yield path
