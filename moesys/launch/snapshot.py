"""What a job runs from: the code and the resolved configuration as they were when it was queued.

RUN/code/           files of the source tree that git tracks, as they are on the disk, and the built library;
                    of an installed package only launch/, the package being as fixed as it is installed
RUN/code/snapshot.json   commit, whether files differed from it, version
RUN/config.yaml
"""

import json
import os
import shutil
import subprocess
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

import moesys
from moesys.config.compose import to_yaml
from moesys.config.schema import RunConfig

PACKAGE = Path(moesys.__file__).resolve().parent
_LIBRARY = "libmoesys.so"
_FACTS = "snapshot.json"
_INIT = "moesys/__init__.py"
_OURS = ("moesys", "configs", "launch")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where the code lies, and what it is."""

    folder: Path
    has_package: bool
    """Whether moesys itself is in it; else the installed one runs."""
    version: str
    commit: str | None
    """Of the source tree."""
    is_changed: bool
    """Whether files differed from the commit."""


def has_source(source: Path = PACKAGE.parent) -> bool:
    """Whether moesys runs from a source tree, which a snapshot then holds."""
    return _INIT in _names(source)


def take_snapshot(folder: Path, source: Path = PACKAGE.parent) -> Snapshot:
    """Copy the code of `source` into `folder`/code, which is there whole or not at all; an older one is replaced.

    Raises:
        ValueError: launch/job.sh is neither in the source tree nor installed.
    """
    names = _names(source)
    has_package = _INIT in names
    beside = folder / f".code.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    if has_package:
        for name in names:
            _copy(source / name, beside / name)
        _copy(source / "moesys" / _LIBRARY, beside / "moesys" / _LIBRARY)
    else:
        shutil.copytree(launch_folder(source), beside / "launch")
    commit = _git(source, "rev-parse", "HEAD") if has_package else None
    snapshot = Snapshot(
        folder=folder / "code",
        has_package=has_package,
        version=moesys.__version__,
        commit=commit.strip() if commit else None,
        is_changed=bool(has_package and _git(source, "status", "--porcelain")),
    )
    facts = {k: v for k, v in asdict(snapshot).items() if k != "folder"}
    (beside / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    old = folder / f".code.{os.getpid()}.old"
    if snapshot.folder.exists():
        os.replace(snapshot.folder, old)
    os.replace(beside, snapshot.folder)
    shutil.rmtree(old, ignore_errors=True)
    return snapshot


def write_config(folder: Path, config: RunConfig) -> Path:
    """`folder`/config.yaml, the resolved configuration, written beside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path, beside = folder / "config.yaml", folder / f".config.yaml.{os.getpid()}"
    beside.write_text(to_yaml(config), encoding="utf-8")
    os.replace(beside, path)
    return path


def _names(source: Path) -> list[str]:
    """Files of the tree; nothing where moesys is installed into an environment in the tree of another project."""
    tracked = _git(source, "ls-files", "-z") or ""
    new = _git(source, "ls-files", "-z", "--others", "--exclude-standard", "--", *_OURS) or ""
    return (tracked + new).split("\0")[:-1]


def launch_folder(source: Path = PACKAGE.parent) -> Path:
    """Where run.sh and its neighbours are: in the source tree, or where they were installed. Raises ValueError."""
    candidates = [source / "launch", Path(sysconfig.get_path("data")) / "share/moesys/launch"]
    for candidate in candidates:
        if (candidate / "job.sh").is_file():
            return candidate
    raise ValueError(
        f"launch/job.sh is neither in {candidates[0]} nor in {candidates[1]}: reinstall moesys"
    )


def _copy(source: Path, target: Path) -> None:
    """A file that git tracks and that is gone, or a library that was not built, is left out."""
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _git(folder: Path, *words: str) -> str | None:
    """None where this is no work tree, or no git is installed."""
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
