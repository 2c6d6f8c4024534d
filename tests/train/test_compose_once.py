"""A start composes the configuration once: each time takes a good part of what is not the import of torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moesys.cli import main
from moesys.config import compose as composing
from moesys.train import job
from tests.train.launched import overrides


class Met(Exception):
    """The rank is about to meet the others."""


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """What is composed until the ranks meet."""
    found: list[Sequence[str]] = []
    compose = composing.compose

    def counted(words: Sequence[str], *more: Any) -> Any:
        found.append(words)
        return compose(words, *more)

    def meet(*args: Any, **kwargs: Any) -> None:
        raise Met

    monkeypatch.setattr(composing, "compose", counted)
    monkeypatch.setattr(job, "compose", counted)
    monkeypatch.setattr(job, "process_group", meet)
    monkeypatch.setattr("moesys.train.signals.leave_on_signals", lambda: None)
    return found


def test_by_the_command(composed: list[Sequence[str]], tiny_data: Path, tmp_path: Path) -> None:
    words = overrides(tmp_path / "run", tiny_data, "parallel.ep=1")
    with pytest.raises(Met):
        main(["train", *words])
    assert composed == [words]


def test_by_a_rank(composed: list[Sequence[str]], tiny_data: Path, tmp_path: Path) -> None:
    words = overrides(tmp_path / "run", tiny_data, "parallel.ep=1")
    with pytest.raises(Met):
        job.main(words)
    assert composed == [words]
