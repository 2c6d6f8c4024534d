"""Data to train on where any text will do: the package's own source, with a small vocabulary."""

from pathlib import Path

from benchmarks.results import ROOT
from moesys.data.prepare import prepare
from moesys.data.recipe import PrepArguments

VOCAB_SIZE = 512


def prepared(folder: Path) -> Path:
    """The data folder. Made once."""
    return _prepared(folder, str(ROOT / "moesys"))


def prepared_library(folder: Path) -> Path:
    """That of the Python standard library."""
    return _prepared(folder, "stdlib")


def _prepared(folder: Path, what: str) -> Path:
    if not (folder / "manifest.json").exists():
        arguments = PrepArguments(
            inputs=(what,),
            output=str(folder),
            include=("*.py",),
            vocab_size=VOCAB_SIZE,
            val_fraction=0.1,
        )
        prepare(arguments, _Silent())
    return folder


class _Silent:
    """A prep of a second has nothing to tell."""

    def line(self, text: str) -> None:
        pass

    def phase(self, label: str, total_bytes: int, done_bytes: int = 0) -> None:
        pass

    def advance(self, count_bytes: int) -> None:
        pass
